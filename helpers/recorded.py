"""Outcomes that were recorded under other versions than the installed one."""

import json
from pathlib import Path
from typing import Any

from helpers.view import Table

LOADS = Path(__file__).parent / "data" / "loads.json"


def loads(dtype: str = "omitted") -> Table:
    """What each checkpoint was loaded as, per Transformers version, for one way to pass ``dtype``.

    Recorded by tools/record_loads.py in one environment per version.
    """
    records = [r for r in json.loads(LOADS.read_text("utf-8")) if r["dtype"] == dtype]
    versions = sorted({r["transformers"] for r in records}, key=_release)
    torch = ", ".join(sorted({r["torch"] for r in records}))
    checkpoints = list(dict.fromkeys(r["checkpoint"] for r in records))
    found = {(r["checkpoint"], r["transformers"]): " and ".join(r["loaded"]) for r in records}
    return Table(
        f"Loaded parameters, dtype {dtype}; recorded with torch {torch}",
        ("Checkpoint", *(f"Transformers {version}" for version in versions)),
        [(name, *(found[name, version] for version in versions)) for name in checkpoints],
    )


def _release(version: str) -> Any:
    return tuple(map(int, version.split(".")))
