"""Write constraints.txt: one version of each package that pyproject.toml brings in, for every
Python and platform that the guide supports.

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

import set_up

# What PyTorch's Linux wheels need for CUDA: each build asks for its own, a CPU build for none.
CUDA = re.compile(r"(nvidia-|cuda-|triton\b)")
HEADER = """\
# The versions that the guide is tested with, for every supported Python and platform.
# Written by `make lock`; edit pyproject.toml instead. PyTorch's own CUDA packages are left free.
"""


def main() -> None:
    """Resolve, filter, write."""
    with tempfile.TemporaryDirectory() as folder:
        lines = resolve(python_with_uv(folder))
    pins = [line for line in lines if not CUDA.match(line)]
    (set_up.ROOT / "constraints.txt").write_text(
        HEADER + "\n".join(pins) + "\n", encoding="utf-8", newline="\n"
    )
    print(f"constraints.txt: {len(pins)} pins.")


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


def resolve(python: str) -> list[str]:
    """The pins, one requirement a line, in alphabetical order."""
    _, (major, minor), _ = set_up.allowed()
    command = [
        *(python, "-m", "uv", "pip", "compile", "pyproject.toml"),
        *("--extra", "test", "--extra", "lock", "--universal"),
        *("--python-version", f"{major}.{minor}", "--no-python-downloads", "--no-build"),
        *("--no-config", "--no-header", "--no-annotate", "--quiet"),
    ]
    result = subprocess.run(command, cwd=set_up.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.splitlines()


if __name__ == "__main__":
    main()
