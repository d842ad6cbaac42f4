"""What was measured once and is kept: a CSV file with its heads, and a JSON file about it."""

import csv
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write(
    folder: Path, name: str, about: Mapping[str, Any], heads: Sequence[str], rows: Iterable[Any]
) -> None:
    """Store both files; an interrupted call leaves the old ones."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
        files = [Path(new) / f"{name}.{end}" for end in ("json", "csv")]
        files[0].write_text(text, "utf-8", newline="\n")
        with files[1].open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(heads)
            lines.writerows(rows)
        for path in files:
            path.replace(folder / path.name)


def differences(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """One line for each entry that is new, gone or different, field by field."""
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        changed = [
            f"{field}: {old.get(field)!r} -> {new.get(field)!r}"
            for field in dict.fromkeys([*old, *new])
            if old.get(field) != new.get(field)
        ]
        if changed:
            yield f"{name}: {'; '.join(changed)}"
