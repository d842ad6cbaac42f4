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


def requires_python() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return SpecifierSet(project["requires-python"])


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


# The files that name versions


def test_the_tested_pythons_are_the_allowed_ones() -> None:
    allowed = [f"3.{minor}" for minor in range(20) if f"3.{minor}" in requires_python()]
    assert tuple(allowed) == PYTHONS


@pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda e: f"{e['python_version']}-{e['sys_platform']}"
)
def test_constraints_pin_each_direct_dependency_within_its_bounds(
    environment: dict[str, str],
) -> None:
    versions: dict[str, list[str]] = {}
    for pin in pins():
        if applies(pin, environment):
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            versions.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    assert [name for name, found in versions.items() if len(found) > 1] == []
    for requirement in requirements("test", "lock"):
        if applies(requirement, environment):
            (version,) = versions[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{version} is outside {requirement}"


def test_constraints_suit_every_build_of_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "+" in line]
    for_cuda = re.compile(r"nvidia|cuda|cudnn|nccl|triton|flash[-_]attn")
    assert [pin.name for pin in pins() if for_cuda.search(pin.name)] == []


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
    name = "tiny-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\nProvides-Extra: test\\n"
    wheel = "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {"tiny.py": "", "tiny-1.0.dist-info/METADATA": metadata,
             "tiny-1.0.dist-info/WHEEL": wheel}
    record = "".join(f"{path},,\\n" for path in files) + "tiny-1.0.dist-info/RECORD,,\\n"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as archive:
        for path, content in [*files.items(), ("tiny-1.0.dist-info/RECORD", record)]:
            archive.writestr(path, content)
    return name
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


class Clone:
    """A folder with our Makefile and tools, and a project without dependencies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("set_up.py", "lab.py"):
            shutil.copy(ROOT / "tools" / name, folder / "tools")
        (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
        (folder / "constraints.txt").write_text("tiny==1.0\n", encoding="utf-8")
        (folder / "backend.py").write_text(BACKEND, encoding="utf-8")

    def make(self, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
        """Run make; its exit code and everything that was printed."""
        result = subprocess.run(
            ["make", *arguments, f"PYTHON={python}"],
            cwd=self.folder,
            env={**os.environ, "PIP_NO_INDEX": "1", "MAKEFLAGS": "", "MAKELEVEL": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout

    def is_ready(self) -> bool:
        python = self.folder / ".venv" / "bin" / "python"
        check = [str(python), str(self.folder / "tools" / "set_up.py"), "--check"]
        return subprocess.run(check, check=False).returncode == 0

    def sentences(self, output: str) -> list[str]:
        """The output without make's own report that a command failed."""
        return [line for line in output.splitlines() if not line.startswith("make")]

    def dist_info(self) -> Path:
        (path,) = (self.folder / ".venv").glob("lib/python*/site-packages/tiny-1.0.dist-info")
        return path


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """One set-up for several tests, since it takes seconds; it begins with a .venv that died."""
    clone = Clone(tmp_path_factory.mktemp("set-up") / "the guide, é")
    binaries = clone.folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(clone.folder / "a Python that was removed")
    code, output = clone.make("setup")
    assert code == 0, output
    assert "Making .venv anew" in output
    return clone


@needs_make
def test_a_second_set_up_does_nothing(clone: Clone) -> None:
    # A Python that does not exist: it is not even asked for.
    assert clone.make("setup", python=NO_PYTHON) == (0, "")
    plain = [sys.executable, str(clone.folder / "tools" / "set_up.py")]
    assert subprocess.run(plain, capture_output=True, check=True).stdout == b""


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_file_asks_for_an_install(clone: Clone, name: str) -> None:
    path = clone.folder / name
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "# changed\n", encoding="utf-8")
    changed = clone.is_ready()
    path.write_text(before, encoding="utf-8")
    assert not changed
    assert clone.is_ready()


@needs_make
def test_a_moved_clone_asks_for_an_install(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    # The editable install points to the old folder.
    old, new = clone.folder, clone.folder.with_name("elsewhere")
    old.rename(new)
    monkeypatch.setattr(clone, "folder", new)
    moved = clone.is_ready()
    new.rename(old)
    assert not moved


@needs_make
def test_a_failed_and_an_interrupted_install_go_on(clone: Clone) -> None:
    constraints = clone.folder / "constraints.txt"
    before = constraints.read_text(encoding="utf-8")
    constraints.write_text("tiny==2.0\n", encoding="utf-8")
    code, output = clone.make("setup")
    constraints.write_text(before, encoding="utf-8")
    assert code != 0
    assert "The set-up did not finish" in clone.sentences(output)[-1]
    assert not clone.is_ready()

    # As a killed pip leaves it: some files of the package are there, but not yet its RECORD.
    (clone.dist_info() / "RECORD").unlink()
    (clone.dist_info().parent / "~iny").mkdir()
    code, output = clone.make("setup")
    assert code == 0, output
    assert "Making .venv anew" not in output
    assert (clone.dist_info() / "RECORD").is_file()
    assert not (clone.dist_info().parent / "~iny").exists()
    assert clone.is_ready()


@needs_make
def test_an_environment_without_pip_is_not_healthy(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    venv = [sys.executable, "-m", "venv", "--without-pip", str(clone.folder / ".venv")]
    subprocess.run(venv, check=True)
    set_up = runpy.run_path(str(clone.folder / "tools" / "set_up.py"))
    assert set_up["venv_python"]().exists()
    assert not set_up["is_healthy"]()


@needs_make
def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    old = tmp_path / "old"
    pretend = (
        "import runpy, sys; sys.version_info = (3, 9, 18); "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$@"\n', encoding="utf-8")
    old.chmod(0o755)
    code, output = clone.make("setup", python=str(old))
    assert code != 0
    (sentence,) = clone.sentences(output)
    assert sentence.startswith("Found Python 3.9.18 (")
    assert "expected >=3.10,<3.14" in sentence
    assert "make setup PYTHON=python3.13" in sentence
    assert not (clone.folder / ".venv").exists()


@needs_make
def test_no_python_is_said_in_one_sentence(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    code, output = clone.make("setup", python=NO_PYTHON)
    assert code != 0
    (sentence,) = clone.sentences(output)
    assert "no-such-python" in sentence
    assert "expected Python >=3.10,<3.14" in sentence


@pytest.mark.parametrize(
    ("version", "has_ensurepip", "windows", "words"),
    [
        ((3, 9, 6), True, False, ["3.9.6", ">=3.10,<3.14", "make setup PYTHON=python3.13"]),
        ((3, 14, 0), True, True, ["3.14.0", ">=3.10,<3.14", "py -3.13 tools/set_up.py"]),
        ((3, 11, 2), False, False, ["3.11.2", "ensurepip", "sudo apt install python3.11-venv"]),
    ],
)
def test_what_is_wrong_with_a_python(
    version: tuple[int, int, int], has_ensurepip: bool, windows: bool, words: list[str]
) -> None:
    set_up = runpy.run_path(str(ROOT / "tools" / "set_up.py"))
    sentence = set_up["complaint"](version, "/usr/bin/python3", has_ensurepip, windows)
    assert [word for word in [*words, "/usr/bin/python3"] if word not in sentence] == []
    assert "\n" not in sentence


@pytest.mark.parametrize("python", PYTHONS)
def test_nothing_is_wrong_with_an_allowed_python(python: str) -> None:
    set_up = runpy.run_path(str(ROOT / "tools" / "set_up.py"))
    assert set_up["complaint"]((*map(int, python.split(".")), 5), "python3", True) is None


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
    listed = [re.fullmatch(r"make (\w+) +\S.*", line) for line in output.splitlines()]
    assert [match and match.group(1) for match in listed] == targets.split()


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
