"""Write dtype-doctor.pyz: the doctor in one file, for any Python from 3.9 on.

    python tools/pyz.py [FILE]

    python dtype-doctor.pyz < traceback.txt
    >>> import sys; sys.path.insert(0, "dtype-doctor.pyz"); from helpers import why; why()

It holds the modules of ``helpers.doctor``, what they import of the guide (the X-ray, for a model
that is asked about before it fails), and their data. The same sources give the same bytes.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "dtype-doctor.pyz"
LEFT_OUT = "helpers.cli"  # the commands that need the whole guide
DATA = ("doctor/**/*.json", "doctor/locale/**/*.mo", "data/panel.*", "data/qwen.json")
# A Python that is too old for the rest, down to 2.7, has to be able to read this.
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit(
        "dtype-doctor needs Python 3.9 or newer, and this is %d.%d: try python3, or copy the text"
        " to a machine that has one." % sys.version_info[:2]
    )
from helpers.doctor.command import main

sys.exit(main())
"""


def main(target: Path) -> None:
    """Write the archive to this file."""
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources()}
    with target.open("wb") as archive:
        archive.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in sorted({**files, "__main__.py": MAIN.encode()}.items()):
                entry = zipfile.ZipInfo(name)  # of 1980
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # as Unix, everywhere
                packed.writestr(entry, content)
    target.chmod(0o755)


def sources() -> set[Path]:
    """The modules and the data."""
    package = ROOT / "helpers"
    waiting = [package / "gate.py", *sorted((package / "doctor").glob("*.py"))]
    found = {package / "__init__.py", *(d for pattern in DATA for d in package.glob(pattern))}
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported(module)
    return found


def imported(module: Path) -> Iterator[Path]:
    """The guide's modules that one imports, wherever it does so, and the packages they are in."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield from file_of(name)


def file_of(name: str) -> Iterator[Path]:
    """The file of a module of the guide; nothing, for what is not one."""
    path = ROOT.joinpath(*name.split("."))
    if name.partition(".")[0] == "helpers" and name not in ("helpers", LEFT_OUT):
        yield from (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
