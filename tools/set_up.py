"""Bring .venv to what pyproject.toml and constraints.txt say; do nothing if it is there already.

    python tools/set_up.py            make, repair or update .venv
    python tools/set_up.py --check    exit with 0 if there is nothing to do, with 1 otherwise

Any Python that pyproject.toml allows can run it. It needs the standard library only, and its syntax
is kept at Python 3.6, so that it can also tell an older Python what is wrong.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
SOURCES = ("pyproject.toml", "constraints.txt")


def main(arguments):
    """Dispatch on the command line; see the module's docstring."""
    if arguments == ["--check"]:
        sys.exit(0 if is_ready() else 1)
    if arguments == ["--install"]:  # this file again, run by .venv's own Python
        return install()
    if arguments:
        sys.exit(f"tools/set_up.py takes --check or nothing, not {' '.join(arguments)!r}.")
    if not is_healthy():
        create()
    sys.exit(subprocess.call([str(venv_python()), str(Path(__file__).resolve()), "--install"]))


def venv_python(windows=os.name == "nt"):
    return VENV / ("Scripts/python.exe" if windows else "bin/python")


def allowed():
    """``requires-python`` of pyproject.toml as text, lowest (major, minor), first refused one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^requires-python = "(>=(\d+)\.(\d+),<(\d+)\.(\d+))"', text, re.MULTILINE)
    low_major, low_minor, high_major, high_minor = map(int, match.groups()[1:])
    return match.group(1), (low_major, low_minor), (high_major, high_minor)


def complaint(version, executable, has_ensurepip, windows=os.name == "nt"):
    """What is wrong with this Python for making .venv, in one sentence; None if nothing is."""
    found = f"Found Python {'.'.join(map(str, version[:3]))} ({executable})"
    text, low, high = allowed()
    if not low <= tuple(version[:2]) < high:
        name = f"{high[0]}.{high[1] - 1}"
        example = f"py -{name} tools/set_up.py" if windows else f"make setup PYTHON=python{name}"
        return f"{found}, expected {text}: install one of these and name it, for example: {example}"
    if not has_ensurepip:
        return (
            f"{found}, but it cannot make a virtual environment, because its module ensurepip is "
            f"not installed: install it (on Debian and Ubuntu: sudo apt install "
            f"python{version[0]}.{version[1]}-venv) and type the same command again"
        )
    return None


def fingerprint():
    """Everything that makes an installed environment out of date when it changes.

    The folder is part of it because the editable install points there, and Python's version because
    a system upgrade can put another Python behind .venv's link.
    """
    parts = [(ROOT / name).read_bytes() for name in SOURCES]
    parts += [str(ROOT).encode(), str(sys.version_info[:2]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_ready():
    """True if the running Python is .venv's and everything was installed into it."""
    return STAMP.is_file() and STAMP.read_text(encoding="utf-8") == fingerprint()


def is_healthy():
    """True if .venv has a Python that runs, is an allowed one, and has a working pip."""
    _, low, high = allowed()
    test = f"import sys; sys.exit(not {low} <= sys.version_info[:2] < {high})"
    for command in (["-c", test], ["-m", "pip", "--version"]):
        try:
            subprocess.check_output([str(venv_python()), *command], stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def create():
    problem = complaint(
        sys.version_info, sys.executable, importlib.util.find_spec("ensurepip") is not None
    )
    if problem:
        sys.exit(problem)
    if VENV.exists():
        print("Making .venv anew: the one that is there does not work.", flush=True)
    code = subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code:
        sys.exit(f"{sys.executable} -m venv failed with exit code {code}; its words are above.")


def install():
    """Install the guide and its tests into the environment of the running Python."""
    import importlib.metadata  # from Python 3.8 on, and this file is also for older ones to read

    if is_ready():
        return
    if STAMP.exists():
        STAMP.unlink()
    remove_half_installed(Path(sysconfig.get_path("purelib")))
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    # A personal setting of `user = true` would otherwise make pip refuse every virtual environment.
    environment = dict(os.environ, PIP_USER="0")
    commands = [[*pip, "-c", "constraints.txt", "-e", ".[test]"]]
    if int(importlib.metadata.version("pip").split(".")[0]) < 22:
        # The pip that came with the first Python 3.10 cannot do editable installs of this kind.
        commands.insert(0, [*pip, "--upgrade", "pip"])
    for command in commands:
        if subprocess.call(command, cwd=str(ROOT), env=environment):
            sys.exit(
                "The set-up did not finish: pip says above why. When that is put right, type the "
                "same command again, and it goes on from here."
            )
    # Matplotlib looks at every font once, and says so if that takes long, which would be a line too
    # many in a notebook's output.
    warm_up = [str(ROOT / "tools" / "lab.py"), "--", "-c", "import matplotlib.font_manager"]
    subprocess.call([sys.executable, *warm_up], stderr=subprocess.DEVNULL)
    STAMP.write_text(fingerprint(), encoding="utf-8")
    print(".venv is ready.")


def remove_half_installed(site_packages):
    """Remove what an interrupted pip left, so that the next one installs those packages again.

    pip writes RECORD last of all, takes a package without it for an installed one, and cannot
    replace it; a name that begins with ~ is a package that it was about to replace.
    """
    for path in site_packages.iterdir():
        unfinished = path.name.endswith(".dist-info") and not (path / "RECORD").is_file()
        if unfinished or path.name.startswith("~"):
            shutil.rmtree(str(path), ignore_errors=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        if sys.argv[1:] == ["--install"]:
            sys.exit(130)  # whoever started this says the rest
        sys.exit("Interrupted. Type the same command again, and the set-up goes on from here.")
