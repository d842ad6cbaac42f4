"""Write constraints.txt and constraints-v4.txt: one version of each package that pyproject.toml
and requirements-v4.in bring in, for every Python and platform that the guide supports.

    python tools/lock.py

uv works them out from the packages' metadata alone; nothing of them is installed or built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from typing import NamedTuple

import set_up

# What PyTorch's Linux wheels need for CUDA: each build asks for its own, a CPU build for none.
CUDA = re.compile(r"(nvidia-|cuda-|triton\b)")
HEADER = """\
# The versions that {what} is tested with, for every supported Python and platform.
# Written by `make lock`; edit {source} instead. PyTorch's own CUDA packages are left free.
"""


class Lock(NamedTuple):
    """A file of pins: what they are for, and the requirements that they come from."""

    name: str
    what: str
    source: str
    extras: tuple[str, ...] = ()


LOCKS = (
    Lock("constraints.txt", "the guide", "pyproject.toml", extras=("test", "lock")),
    Lock("constraints-v4.txt", "Transformers 4", "requirements-v4.in"),
)


def main() -> None:
    """Resolve all, then filter and write, so that either every file is of today or none is."""
    with tempfile.TemporaryDirectory() as folder:
        python = python_with_uv(folder)
        resolved = [resolve(python, lock) for lock in LOCKS]
    for lock, lines in zip(LOCKS, resolved, strict=True):
        pins = [line for line in lines if not CUDA.match(line)]
        (set_up.ROOT / lock.name).write_text(
            HEADER.format(what=lock.what, source=lock.source) + "\n".join(pins) + "\n",
            encoding="utf-8",
            newline="\n",
        )
        print(f"{lock.name}: {len(pins)} pins.")


def python_with_uv(folder: str) -> str:
    """Install the extra ``lock`` apart from .venv, which the new pins may be needed to make."""
    text = (set_up.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^lock = (\[.*\])$", text, re.MULTILINE)
    if match is None:
        sys.exit('pyproject.toml has no line lock = ["uv..."], which says what makes the lock.')
    builder = venv.EnvBuilder(with_pip=True)
    builder.create(folder)
    python = builder.ensure_directories(folder).env_exe
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *json.loads(match.group(1))], check=True)
    return python


def resolve(python: str, lock: Lock) -> list[str]:
    """The pins that a lock's source leads to, one requirement a line, in alphabetical order."""
    _, (major, minor), _ = set_up.allowed()
    command = [
        *(python, "-m", "uv", "pip", "compile", lock.source),
        *(f"--extra={extra}" for extra in lock.extras),
        *("--universal", "--python-version", f"{major}.{minor}"),
        *("--no-python-downloads", "--no-build"),
        *("--no-config", "--no-header", "--no-annotate", "--quiet"),
    ]
    result = subprocess.run(command, cwd=set_up.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.splitlines()


if __name__ == "__main__":
    main()
