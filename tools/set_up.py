"""Bring an environment to what its files say; do nothing if it is there already.

    python tools/set_up.py            make, repair or update .venv, which has Transformers 5
    python tools/set_up.py --v4       the same for .venv-v4, which has Transformers 4
    ... --check                       exit with 0 if there is nothing to do, with 1 otherwise

Any Python that pyproject.toml allows can run it. It needs the standard library only, and its syntax
is kept at Python 3.6, so that it can also tell an older Python what is wrong.
"""

import csv
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Environment(NamedTuple):
    """A virtual environment: its folder, and what makes it."""

    name: str
    sources: tuple  # the files that say what belongs into it
    installs: tuple  # what each call of `pip install` gets
    flags: tuple  # how to name it to this file
    target: str  # ... and to make

    @property
    def folder(self):
        return ROOT / self.name

    @property
    def stamp(self):
        return self.folder / "installed"

    @property
    def python(self):
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


V5 = Environment(
    name=".venv",
    sources=("pyproject.toml", "constraints.txt"),
    installs=(("-c", "constraints.txt", "-e", ".[test]"),),
    flags=(),
    target="setup",
)
V4 = Environment(
    name=".venv-v4",
    sources=("pyproject.toml", "requirements-v4.in", "constraints-v4.txt"),
    # pyproject.toml wants Transformers 5: hence --no-deps, and no word of it from pip in a repair.
    installs=(
        ("--no-warn-conflicts", "-c", "constraints-v4.txt", "-r", "requirements-v4.in"),
        ("--no-deps", "-e", "."),
    ),
    flags=("--v4",),
    target="setup-v4",
)


def main(arguments):
    """Dispatch on the command line; see the module's docstring."""
    environment = V4 if arguments[:1] == ["--v4"] else V5
    step = arguments[len(environment.flags) :]
    if step == ["--check"]:
        sys.exit(0 if is_ready(environment) else 1)
    if step == ["--install"]:  # this file again, run by the environment's own Python
        return install(environment)
    if step:
        sys.exit(
            f"tools/set_up.py takes --v4, --check, both in this order, or nothing, "
            f"not {' '.join(arguments)!r}."
        )
    if not is_healthy(environment):
        create(environment)
    this_file = str(Path(__file__).resolve())
    command = [str(environment.python), this_file, *environment.flags, "--install"]
    sys.exit(subprocess.call(command))


def allowed():
    """``requires-python`` of pyproject.toml as text, lowest (major, minor), first refused one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^requires-python = "(>=(\d+)\.(\d+),<(\d+)\.(\d+))"', text, re.MULTILINE)
    low_major, low_minor, high_major, high_minor = map(int, match.groups()[1:])
    return match.group(1), (low_major, low_minor), (high_major, high_minor)


def complaint(environment, version, executable, has_ensurepip, windows=os.name == "nt"):
    """What is wrong with this Python for making it, in one sentence; None if nothing is."""
    found = f"Found Python {'.'.join(map(str, version[:3]))} ({executable})"
    text, low, high = allowed()
    if not low <= tuple(version[:2]) < high:
        name = f"{high[0]}.{high[1] - 1}"
        example = f"make {environment.target} PYTHON=python{name}"
        if windows:
            example = " ".join([f"py -{name} tools/set_up.py", *environment.flags])
        return f"{found}, expected {text}: install one of these and name it, for example: {example}"
    if not has_ensurepip:
        return (
            f"{found}, but it cannot make a virtual environment, because its module ensurepip is "
            f"not installed: install it (on Debian and Ubuntu: sudo apt install "
            f"python{version[0]}.{version[1]}-venv) and type the same command again"
        )
    return None


def fingerprint(environment):
    """Everything that makes an installed environment out of date when it changes.

    The folder is part of it because the editable install points there, and Python's version because
    a system upgrade can put another Python behind the environment's link.
    """
    parts = [(ROOT / name).read_bytes() for name in environment.sources]
    parts += [str(ROOT).encode(), str(sys.version_info[:2]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_ready(environment):
    """True if everything was installed into it and is still there; its own Python has to ask."""
    if not environment.stamp.is_file():
        return False
    stamped, *names = environment.stamp.read_text(encoding="utf-8").split("\n")
    if stamped != fingerprint(environment) or not names or set(names) - contents():
        return False
    return not any(map(is_half_installed, site_packages().iterdir()))


def is_healthy(environment):
    """True if it has a Python that runs, is an allowed one, and has a working pip."""
    _, low, high = allowed()
    test = f"import sys; sys.exit(not {low} <= sys.version_info[:2] < {high})"
    for command in (["-c", test], ["-m", "pip", "--version"]):
        try:
            subprocess.check_output([str(environment.python), *command], stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def create(environment):
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    problem = complaint(environment, sys.version_info, sys.executable, has_ensurepip)
    if problem:
        sys.exit(problem)
    if environment.folder.exists():
        print(f"Making {environment.name} anew: the one that is there does not work.", flush=True)
    code = subprocess.call([sys.executable, "-m", "venv", "--clear", str(environment.folder)])
    if code:
        sys.exit(f"{sys.executable} -m venv failed with exit code {code}; its words are above.")


def install(environment):
    """Install what belongs into it; the running Python is its own."""
    import importlib.metadata  # from Python 3.8 on, and this file is also for older ones to read

    if is_ready(environment):
        return
    if environment.stamp.exists():
        environment.stamp.unlink()
    remove_damaged(site_packages())
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    # A personal setting of `user = true` would otherwise make pip refuse every virtual environment.
    variables = dict(os.environ, PIP_USER="0")
    commands = [[*pip, *arguments] for arguments in environment.installs]
    if int(importlib.metadata.version("pip").split(".")[0]) < 22:
        # The pip that came with the first Python 3.10 cannot do editable installs of this kind.
        commands.insert(0, [*pip, "--upgrade", "pip"])
    for command in commands:
        if subprocess.call(command, cwd=str(ROOT), env=variables):
            sys.exit(
                "The set-up did not finish: pip says above why. When that is put right, type the "
                "same command again, and it goes on from here."
            )
    if environment is V5:
        # Matplotlib looks at every font once, and says so if that takes long, which would be a line
        # too many in a notebook's output.
        warm_up = [str(ROOT / "tools" / "lab.py"), "--", "-c", "import matplotlib.font_manager"]
        subprocess.call([sys.executable, *warm_up], stderr=subprocess.DEVNULL)
    stamp = [fingerprint(environment), *sorted(contents())]
    environment.stamp.write_text("\n".join(stamp), encoding="utf-8")
    print(f"{environment.name} is ready.")


def site_packages():
    return Path(sysconfig.get_path("purelib"))


def contents():
    """What lies in site-packages, without the versions: those may be changed by hand."""
    names = {re.sub(r"-[^-]*(?=\.dist-info$)", "", path.name) for path in site_packages().iterdir()}
    return names - {"__pycache__"}


def is_half_installed(path):
    """True for a package's .dist-info that pip did not finish: it writes RECORD last of all."""
    return path.name.endswith(".dist-info") and not (path / "RECORD").is_file()


def is_gutted(path):
    """True for a package's .dist-info where a folder or a module of the package is gone."""
    if not path.name.endswith(".dist-info"):
        return False
    with (path / "RECORD").open(encoding="utf-8", newline="") as record:
        names = {row[0].split("/")[0] for row in csv.reader(record) if row}
    # What Python compiles can be deleted at any time.
    return any(not (path.parent / name).exists() for name in names - {"__pycache__"})


def remove_damaged(folder):
    """Remove what an interrupted pip left, and what says of a package that it is there when it is
    not, so that the next pip installs those packages again.

    pip takes a package for an installed one by its .dist-info alone, and without RECORD cannot
    replace it; a name that begins with ~ is a package that it was about to replace.
    """
    for path in folder.iterdir():
        if path.name.startswith("~") or is_half_installed(path) or is_gutted(path):
            shutil.rmtree(str(path), ignore_errors=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        if sys.argv[-1] == "--install":
            sys.exit(130)  # whoever started this says the rest
        sys.exit("Interrupted. Type the same command again, and the set-up goes on from here.")
