"""The set-up: the files that name versions agree, and the commands do what the README says."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = {
    "linux": {"os_name": "posix", "platform_system": "Linux", "platform_machine": "x86_64"},
    "darwin": {"os_name": "posix", "platform_system": "Darwin", "platform_machine": "arm64"},
    "win32": {"os_name": "nt", "platform_system": "Windows", "platform_machine": "AMD64"},
}
ENVIRONMENTS = [
    {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": name, **values}
    for python in PYTHONS
    for name, values in PLATFORMS.items()
]

needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git clone"
)
needs_make = pytest.mark.skipif(
    os.name == "nt" or not shutil.which("make"), reason="make is not installed"
)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no $HOME to watch")


def requirements(*extras: str) -> list[Requirement]:
    """The direct dependencies of pyproject.toml and of some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def requirements_v4() -> list[Requirement]:
    """What requirements-v4.in lists."""
    lines = (ROOT / "requirements-v4.in").read_text(encoding="utf-8").splitlines()
    listed = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(line) for line in listed if line]


def requires_python() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return SpecifierSet(project["requires-python"])


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(name: str, environment: dict[str, str]) -> dict[str, str]:
    """The version of each package that a constraints file allows in one environment."""
    versions: dict[str, str] = {}
    for pin in pins(name):
        if applies(pin, environment):
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            key = canonicalize_name(pin.name)
            assert key not in versions, f"{name} has two versions of {key}"
            versions[key] = specifier.version
    return versions


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


# The files that name versions


def test_the_tested_pythons_are_the_allowed_ones() -> None:
    allowed = [f"3.{minor}" for minor in range(20) if f"3.{minor}" in requires_python()]
    assert tuple(allowed) == PYTHONS


in_each_environment = pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda e: f"{e['python_version']}-{e['sys_platform']}"
)


@in_each_environment
@pytest.mark.parametrize("name", ["constraints.txt", "constraints-v4.txt"])
def test_constraints_pin_each_direct_dependency_within_its_bounds(
    name: str, environment: dict[str, str]
) -> None:
    versions = pinned(name, environment)
    direct = requirements("test", "lock") if name == "constraints.txt" else requirements_v4()
    for requirement in direct:
        if applies(requirement, environment):
            version = versions[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{version} is outside {requirement}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-v4.txt"])
def test_constraints_suit_every_build_of_torch(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "+" in line]
    for_cuda = re.compile(r"nvidia|cuda|cudnn|nccl|triton|flash[-_]attn")
    assert [pin.name for pin in pins(name) if for_cuda.search(pin.name)] == []


def test_transformers_4_is_asked_for_with_the_bounds_of_pyproject() -> None:
    bounds = {requirement.name: requirement.specifier for requirement in requirements("test")}
    for_v4 = {requirement.name: requirement.specifier for requirement in requirements_v4()}
    assert for_v4.pop("transformers") == SpecifierSet("==4.57.6")
    assert for_v4.pop("kernels") == SpecifierSet(">=0.11.4,<0.13")
    assert {"torch", "peft", "accelerate"} <= set(for_v4)
    assert for_v4 == {name: bounds.get(name) for name in for_v4}


@in_each_environment
def test_two_outcomes_differ_by_what_transformers_4_needs_only(
    environment: dict[str, str],
) -> None:
    v5, v4 = (pinned(name, environment) for name in ("constraints.txt", "constraints-v4.txt"))
    assert set(v4) <= set(v5)
    different = {name for name in v4 if v4[name] != v5[name]}
    assert different == {"transformers", "tokenizers", "huggingface-hub", "kernels"}


def test_flash_attn_is_in_no_default_install() -> None:
    assert "flash-attn" in {requirement.name for requirement in requirements("gpu")}
    assert "flash-attn" not in {requirement.name for requirement in requirements("test", "lock")}


def test_conda_installs_what_pyproject_says() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *from_conda, pip = content["dependencies"]
    python = dict(line.split("=", 1) for line in from_conda if line.startswith("python="))["python"]
    assert python in requires_python()
    options = [line for line in pip["pip"] if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    listed = {str(Requirement(line)) for line in pip["pip"] if line not in options}
    expected = set()
    for requirement in requirements("test"):
        if applies(requirement, {"python_version": python}):
            requirement.marker = None
            expected.add(str(requirement))
    assert listed == expected


def test_every_line_of_the_conda_file_says_what_needs_it() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    items = [line for line in text.splitlines() if re.match(r" *- (?!pip:)", line)]
    assert len(items) > len(requirements("test"))
    assert [line for line in items if not re.search(r"\S  # \w", line)] == []


@needs_git
def test_no_file_names_a_machine_or_an_index() -> None:
    # The folders above this clone and the home folder, wherever they are on this machine.
    forbidden = [f"{folder}{os.sep}" for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
    forbidden += [".".join(host) for host in (("pypi", "org"), ("files", "pythonhosted"))]
    forbidden += [".".join(("download", "pytorch")), ".".join(("conda", "anaconda", "org"))]
    listing = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    paths = [ROOT / name for name in listing.split("\0") if name]
    assert ROOT / "pyproject.toml" in paths
    found = []
    for path in paths:
        if path.is_file():
            content = path.read_bytes()
            found += [(path.name, word) for word in forbidden if word.encode() in content]
    assert found == []


# make setup

BACKEND = '''
"""The least that pip accepts as a build backend, so that no network is needed."""
import zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    more = "Provides-Extra: test\\nRequires-Dist: part==5.0\\n"
    return write(wheel_directory, "tiny", "1.0", more)

def write(folder, name, version, more=""):
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{more}"
    wheel = "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    code = f"version = {version!r}"
    files = {f"{name}.py": code, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel}
    record = "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"])
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{file}", "w") as archive:
        for path, content in [*files.items(), (f"{info}/RECORD", record)]:
            archive.writestr(path, content)
    return file
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1.0"
requires-python = ">=3.10,<3.14"
"""


NO_PYTHON = "no-such-python"


class Kind(NamedTuple):
    """One of the two environments, as its users know it."""

    target: str
    folder: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    part: str  # the version of the package `part` that it gets in a Clone


V5 = Kind("setup", ".venv", (), ("pyproject.toml", "constraints.txt"), "5.0")
V4 = Kind(
    target="setup-v4",
    folder=".venv-v4",
    flags=("--v4",),
    sources=("pyproject.toml", "requirements-v4.in", "constraints-v4.txt"),
    part="4.0",
)
of_both_kinds = pytest.mark.parametrize("kind", [V5, V4], ids=lambda kind: kind.folder)


class Clone:
    """A folder with our Makefile and tools, and a project that depends on one package only: on
    version 5 of it, as the guide on Transformers, where .venv-v4 gets version 4."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("set_up.py", "lab.py"):
            shutil.copy(ROOT / "tools" / name, folder / "tools")
        files = {
            "pyproject.toml": PYPROJECT,
            "backend.py": BACKEND,
            "constraints.txt": "part==5.0\n",
            "constraints-v4.txt": "part==4.0\n",
            "requirements-v4.in": "part>=4\n",
        }
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        write_wheel = runpy.run_path(str(folder / "backend.py"))["write"]
        for kind in (V5, V4):
            write_wheel(self.wheels, "part", kind.part)

    def make(self, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
        """Run make; its exit code and everything that was printed."""
        result = subprocess.run(
            ["make", *arguments, f"PYTHON={python}"],
            cwd=self.folder,
            env={
                **os.environ,
                **{"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri()},
                **{"MAKEFLAGS": "", "MAKELEVEL": ""},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout

    def python(self, kind: Kind) -> Path:
        return self.folder / kind.folder / "bin" / "python"

    def is_ready(self, kind: Kind) -> bool:
        set_up = str(self.folder / "tools" / "set_up.py")
        check = [str(self.python(kind)), set_up, *kind.flags, "--check"]
        return subprocess.run(check, check=False).returncode == 0

    def sentences(self, output: str) -> list[str]:
        """The output without make's own report that a command failed."""
        return [line for line in output.splitlines() if not line.startswith("make")]

    def dist_info(self, kind: Kind) -> Path:
        pattern = f"lib/python*/site-packages/part-{kind.part}.dist-info"
        (path,) = (self.folder / kind.folder).glob(pattern)
        return path

    def break_python(self, kind: Kind) -> None:
        """As it is after an upgrade of the Python that the environment was made with."""
        python = self.python(kind)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.unlink(missing_ok=True)
        python.symlink_to(self.folder / "a Python that was removed")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """One set-up for several tests, since it takes seconds; it begins with environments that
    died."""
    clone = Clone(tmp_path_factory.mktemp("set-up") / "the guide, é")
    for kind in (V5, V4):
        clone.break_python(kind)
        code, output = clone.make(kind.target)
        assert code == 0, output
        assert f"Making {kind.folder} anew" in output
        assert clone.sentences(output)[-1] == f"{kind.folder} is ready."
    return clone


@needs_make
@of_both_kinds
def test_a_second_set_up_does_nothing(clone: Clone, kind: Kind) -> None:
    # A Python that does not exist: it is not even asked for.
    assert clone.make(kind.target, python=NO_PYTHON) == (0, "")
    plain = [sys.executable, str(clone.folder / "tools" / "set_up.py"), *kind.flags]
    assert subprocess.run(plain, capture_output=True, check=True).stdout == b""


@needs_make
@of_both_kinds
def test_each_environment_has_its_own_version_and_the_project(clone: Clone, kind: Kind) -> None:
    code = "import part, tiny; print(part.version)"
    command = [str(clone.python(kind)), "-c", code]
    assert subprocess.check_output(command, text=True) == f"{kind.part}\n"


@needs_make
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind.folder}-{name}")
        for kind in (V5, V4)
        for name in kind.sources
    ],
)
def test_a_changed_file_asks_for_an_install(clone: Clone, kind: Kind, name: str) -> None:
    path = clone.folder / name
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "# changed\n", encoding="utf-8")
    changed = clone.is_ready(kind)
    path.write_text(before, encoding="utf-8")
    assert not changed
    assert clone.is_ready(kind)


@needs_make
@of_both_kinds
def test_a_moved_clone_asks_for_an_install(
    clone: Clone, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The editable install points to the old folder.
    old, new = clone.folder, clone.folder.with_name("elsewhere")
    old.rename(new)
    monkeypatch.setattr(clone, "folder", new)
    moved = clone.is_ready(kind)
    new.rename(old)
    assert not moved


@needs_make
@of_both_kinds
def test_a_failed_and_an_interrupted_install_go_on(clone: Clone, kind: Kind) -> None:
    constraints = clone.folder / kind.sources[-1]
    before = constraints.read_text(encoding="utf-8")
    constraints.write_text("part==9.0\n", encoding="utf-8")
    code, output = clone.make(kind.target)
    constraints.write_text(before, encoding="utf-8")
    assert code != 0
    assert "The set-up did not finish" in clone.sentences(output)[-1]
    assert not clone.is_ready(kind)

    # As a killed pip leaves it: some files of the package are there, but not yet its RECORD.
    (clone.dist_info(kind) / "RECORD").unlink()
    (clone.dist_info(kind).parent / "~art").mkdir()
    code, output = clone.make(kind.target)
    assert code == 0, output
    assert "anew" not in output
    assert (clone.dist_info(kind) / "RECORD").is_file()
    assert not (clone.dist_info(kind).parent / "~art").exists()
    assert clone.is_ready(kind)


@needs_make
@of_both_kinds
def test_a_package_that_was_damaged_later_is_installed_again(clone: Clone, kind: Kind) -> None:
    # As a pip leaves it that somebody ran by hand and interrupted.
    (clone.dist_info(kind) / "RECORD").unlink()
    assert not clone.is_ready(kind)
    code, output = clone.make(kind.target)
    assert code == 0, output
    # pip has no word on the project's wish for version 5, which .venv-v4 does not grant.
    assert "ERROR" not in output
    assert (clone.dist_info(kind) / "RECORD").is_file()
    assert clone.is_ready(kind)


@needs_make
@of_both_kinds
@pytest.mark.parametrize("gone", ["part.py", "part-*.dist-info", "tiny.py"])
def test_a_package_that_is_gone_is_installed_again(clone: Clone, kind: Kind, gone: str) -> None:
    (path,) = clone.dist_info(kind).parent.glob(gone)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert not clone.is_ready(kind)
    code, output = clone.make(kind.target)
    assert code == 0, output
    assert path.exists()
    assert clone.is_ready(kind)


@needs_make
@of_both_kinds
def test_a_version_that_was_changed_by_hand_stays(clone: Clone, kind: Kind) -> None:
    installed = clone.dist_info(kind)
    other = installed.rename(installed.with_name("part-4.5.dist-info"))
    shutil.rmtree(installed.parent / "__pycache__", ignore_errors=True)
    ready = clone.is_ready(kind)
    other.rename(installed)
    assert ready


@needs_make
@of_both_kinds
def test_an_empty_environment_is_not_ready_whatever_its_stamp_says(
    clone: Clone, kind: Kind
) -> None:
    folder = clone.folder / kind.folder
    stamp = (folder / "installed").read_text(encoding="utf-8")
    venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)]
    subprocess.run(venv, check=True)
    for text in (stamp, stamp.splitlines()[0]):
        (folder / "installed").write_text(text, encoding="utf-8")
        assert not clone.is_ready(kind)
    code, output = clone.make(kind.target)
    assert code == 0, output
    assert f"Making {kind.folder} anew" in output
    assert clone.is_ready(kind)


@needs_make
@pytest.mark.parametrize("broken", [False, True], ids=["deleted", "broken"])
def test_matrix_runs_in_both_environments_and_mends_the_second(clone: Clone, broken: bool) -> None:
    (clone.folder / "tools" / "matrix.py").write_text(
        "import os, part; print('ran with', part.version, 'in', os.environ['IPYTHONDIR'])",
        encoding="utf-8",
    )
    if broken:
        clone.break_python(V4)
    else:
        shutil.rmtree(clone.folder / V4.folder)
    code, output = clone.make("matrix")
    assert code == 0, output
    assert ("Making .venv-v4 anew: the one that is there does not work." in output) == broken
    state = clone.folder / ".jupyter" / "ipython"
    ran = [line for line in output.splitlines() if line.startswith("ran with")]
    assert ran == [f"ran with {kind.part} in {state}" for kind in (V5, V4)]


@needs_make
@of_both_kinds
def test_an_environment_without_pip_is_not_healthy(tmp_path: Path, kind: Kind) -> None:
    clone = Clone(tmp_path / "clone")
    venv = [sys.executable, "-m", "venv", "--without-pip", str(clone.folder / kind.folder)]
    subprocess.run(venv, check=True)
    set_up = runpy.run_path(str(clone.folder / "tools" / "set_up.py"))
    environment = set_up["V4" if kind is V4 else "V5"]
    assert environment.python.exists()
    assert not set_up["is_healthy"](environment)


@needs_make
@of_both_kinds
def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path, kind: Kind) -> None:
    clone = Clone(tmp_path / "clone")
    old = tmp_path / "old"
    pretend = (
        "import runpy, sys; sys.version_info = (3, 9, 18); "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$@"\n', encoding="utf-8")
    old.chmod(0o755)
    code, output = clone.make(kind.target, python=str(old))
    assert code != 0
    (sentence,) = clone.sentences(output)
    assert sentence.startswith("Found Python 3.9.18 (")
    assert "expected >=3.10,<3.14" in sentence
    assert f"make {kind.target} PYTHON=python3.13" in sentence
    assert not (clone.folder / kind.folder).exists()


@needs_make
@pytest.mark.parametrize("target", ["setup", "setup-v4", "lock"])
def test_no_python_is_said_in_one_sentence(tmp_path: Path, target: str) -> None:
    clone = Clone(tmp_path / "clone")
    code, output = clone.make(target, python=NO_PYTHON)
    assert code != 0
    (sentence,) = clone.sentences(output)
    assert "no-such-python" in sentence
    assert "expected Python >=3.10,<3.14" in sentence
    assert f"make {target} PYTHON=" in sentence


@pytest.mark.parametrize("arguments", [["--v5"], ["--check", "--v4"], ["--v4", "--all"]])
def test_a_flag_that_set_up_does_not_know_is_said_in_one_sentence(arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "set_up.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.endswith(f"not {' '.join(arguments)!r}.")


@pytest.mark.parametrize(
    ("kind", "version", "has_ensurepip", "windows", "words"),
    [
        ("V5", (3, 9, 6), True, False, ["3.9.6", ">=3.10,<3.14", "make setup PYTHON=python3.13"]),
        ("V4", (3, 9, 6), True, False, ["3.9.6", ">=3.10,<3.14", "make setup-v4 PYTHON="]),
        ("V5", (3, 14, 0), True, True, ["3.14.0", ">=3.10,<3.14", "py -3.13 tools/set_up.py"]),
        ("V4", (3, 14, 0), True, True, ["3.14.0", "py -3.13 tools/set_up.py --v4"]),
        ("V4", (3, 11, 2), False, False, ["3.11.2", "sudo apt install python3.11-venv"]),
    ],
)
def test_what_is_wrong_with_a_python(
    kind: str, version: tuple[int, int, int], has_ensurepip: bool, windows: bool, words: list[str]
) -> None:
    set_up = runpy.run_path(str(ROOT / "tools" / "set_up.py"))
    python = "/usr/bin/python3"
    sentence = set_up["complaint"](set_up[kind], version, python, has_ensurepip, windows)
    assert [word for word in [*words, python] if word not in sentence] == []
    assert "\n" not in sentence


@pytest.mark.parametrize("python", PYTHONS)
def test_nothing_is_wrong_with_an_allowed_python(python: str) -> None:
    set_up = runpy.run_path(str(ROOT / "tools" / "set_up.py"))
    version = (*map(int, python.split(".")), 5)
    assert set_up["complaint"](set_up["V4"], version, "python3", True) is None


def test_an_old_python_can_read_the_set_up() -> None:
    source = (ROOT / "tools" / "set_up.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))


@needs_make
def test_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    output = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = [re.fullmatch(r"make ([\w-]+) +\S.*", line) for line in output.splitlines()]
    assert [match and match.group(1) for match in listed] == targets.split()


@needs_posix
@pytest.mark.parametrize("setup_works", [True, False])
def test_ci_makes_both_environments_and_does_not_skip(tmp_path: Path, setup_works: bool) -> None:
    # Nothing is missing, so that nothing is installed; make only writes down what it is asked for.
    commands = {"python3": "exit 0", "chromium": "exit 0"}
    commands["make"] = f'echo "$@" "CI=$CI"; [[ $1 == test ]] || {str(setup_works).lower()}'
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    command = [str(ROOT / ".ci" / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    asked_for = ["setup-v4 CI=true", "test CI=true"]
    assert result.stdout.splitlines() == (asked_for if setup_works else asked_for[:1])
    assert (result.returncode == 0) == setup_works


# tools/lab.py


def lab(folder: Path, *arguments: str, home: Path) -> subprocess.Popen[str]:
    """Start a copy of tools/lab.py in a folder of its own, with an empty home folder."""
    (folder / "tools").mkdir()
    home.mkdir()
    shutil.copy(ROOT / "tools" / "lab.py", folder / "tools")
    personal = ("JUPYTER", "IPYTHON", "MPL", "XDG_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(personal)}
    return subprocess.Popen(
        [sys.executable, str(folder / "tools" / "lab.py"), *arguments],
        env={**environment, "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outside_the_cache(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.relative_to(home).parts[0] != ".cache"]


@needs_posix
def test_a_command_runs_in_the_clone_and_keeps_its_exit_code(tmp_path: Path) -> None:
    code = (
        "import IPython, os, sys, matplotlib.font_manager; from jupyter_core import paths;"
        "IPython.start_ipython(['--no-banner', '-c', 'pass']); print(os.getcwd());"
        "print(paths.jupyter_config_dir(), paths.jupyter_data_dir(), paths.jupyter_runtime_dir());"
        "sys.exit(3)"
    )
    process = lab(tmp_path, "--", "-c", code, home=tmp_path / "home")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    folder, jupyter = output.splitlines()[-2:]
    assert folder == str(tmp_path)
    state = tmp_path / ".jupyter"
    assert jupyter == f"{state / 'config'} {state / 'data'} {state / 'runtime'}"
    assert (state / "ipython" / "profile_default").is_dir()
    assert list((state / "matplotlib").glob("fontlist*"))
    assert outside_the_cache(tmp_path / "home") == []


@needs_posix
def test_lab_opens_the_first_notebook_and_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    flags = ("--no-browser", "--ServerApp.port=0")
    process = lab(tmp_path, *flags, home=tmp_path / "home")
    try:
        server = running_server(tmp_path / ".jupyter" / "runtime", process)
        address, _ = get(server, "")
        _, answer = get(server, "lab/api/settings/@jupyterlab/apputils-extension:notification")
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert address.endswith("/lab/tree/notebooks/00_start_here.ipynb")
    assert json.loads(answer)["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert outside_the_cache(tmp_path / "home") == []


def running_server(runtime: Path, process: subprocess.Popen[str]) -> dict[str, str]:
    """What a Jupyter server says about itself, as soon as it answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        for path in runtime.glob("jpserver-*.json"):
            # The file is made before it is filled, and filled before the server listens.
            with contextlib.suppress(OSError, ValueError):
                server: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
                get(server, "api")
                return server
        time.sleep(0.1)
    pytest.fail("JupyterLab did not answer within a minute")


def get(server: dict[str, str], path: str) -> tuple[str, str]:
    """The address that one of the server's pages ends up at, and its text."""
    headers = {"Authorization": f"token {server['token']}"}
    request = urllib.request.Request(server["url"] + path, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.url, response.read().decode()
