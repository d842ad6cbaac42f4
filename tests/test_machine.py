"""The report on the machine: [OK] and [FAIL] where they belong, and fixes that can be typed."""

import re
import runpy
import shlex
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

from helpers import checkpoints, machine
from helpers.experiment import Outcome
from helpers.machine import Check
from helpers.plan import LoadPlan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        ((3, 9, 18), False),
        ((3, 10, 0), True),
        ((3, 11, 9), True),
        ((3, 13, 1), True),
        ((3, 14, 0), False),
        ((2, 7, 18), False),
    ],
)
def test_python_version(found, ok):
    check = machine.python_version(found)
    assert check.ok == ok
    assert check.found == ".".join(map(str, found))
    assert (">=3.10" in str(check) and "<3.14" in str(check)) == (not ok)


@pytest.mark.parametrize(
    ("line", "installed", "ok"),
    [
        ("torch>=2.13,<2.14", "2.13.0", True),
        ("torch>=2.13,<2.14", "2.13.1+cu130", True),
        ("torch>=2.13,<2.14", "2.14.0", False),
        ("torch>=2.13,<2.14", "2.12.0+cpu", False),
        ("peft>=0.21.2,<0.22", None, False),
        ('transformers[kernels]==5.22.2; python_version >= "3.11"', "5.22.2", True),
        ('transformers[kernels]==5.22.2; python_version >= "3.11"', "4.57.6", False),
        ("a-b", "1.0rc1", True),
    ],
)
def test_package(monkeypatch, line, installed, ok):
    def fake(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(machine, "version", fake)
    requirement = Requirement(line)
    check = machine.package(requirement)
    assert check.ok == ok
    assert check.found == ("not installed" if installed is None else installed.split("+")[0])
    if not ok:  # a shell hands pip one argument that pip understands
        *command, wanted = shlex.split(check.fix)
        assert command == ["pip", "install", "-c", "constraints.txt"]
        assert Requirement(wanted).specifier == requirement.specifier
        assert Requirement(wanted).extras == requirement.extras
        assert Requirement(wanted).name == requirement.name
    assert str(requirement) == str(Requirement(line)), "the requirement itself was changed"


def test_requirements_are_those_of_this_python_without_extras(monkeypatch):
    lines = [
        "torch>=2",
        'old; python_version < "3"',
        'new; python_version >= "3"',
        'flash-attn>=2.8; extra == "gpu"',
        "lib[fast]==1",
    ]
    lib = ["numpy", 'quick>=1; extra == "fast"', 'slow; extra == "slow"']
    monkeypatch.setattr(machine, "requires", {machine.PROJECT: lines, "lib": lib}.__getitem__)
    assert [r.name for r in machine.requirements()] == ["torch", "new", "lib", "quick"]

    def not_installed(project):
        raise PackageNotFoundError(project)

    monkeypatch.setattr(machine, "requires", not_installed)
    assert machine.requirements() == []


def test_cache_folder(monkeypatch, tmp_path):
    assert machine.cache_folder().ok

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage(1, 1, 10 * 2**20))
        check = machine.cache_folder()
    assert not check.ok
    assert str(checkpoints.get("bf16")) in check.fix

    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(checkpoints.CACHE, str(blocked))
    check = machine.cache_folder()
    assert check.found == "kept for this process only"
    assert checkpoints.CACHE in check.fix


def test_a_run_that_fails_or_is_wrong_is_no_ok(monkeypatch):
    from helpers import experiment

    for outcome, ok in (
        (Outcome(LoadPlan(), finite=True, text="fine"), True),
        (Outcome(LoadPlan(), finite=False, text="!!!!"), False),
        (Outcome(LoadPlan(), error_type="OSError", error="no"), False),
    ):
        monkeypatch.setattr(experiment, "run", lambda plan, outcome=outcome: outcome)
        check = machine.one_run()
        assert check.ok == ok
        assert check.found == str(outcome)


def test_this_machine_is_ready(capsys, monkeypatch):
    """All of it, for real, as the command and as notebook 00 call it."""
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    with pytest.raises(SystemExit) as ended, pytest.warns(RuntimeWarning, match="sys.modules"):
        runpy.run_module("helpers.machine", run_name="__main__")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    *lines, last = printed.splitlines()
    assert last == "Everything is ready."
    assert all(re.match(r"\[OK\] [\w .-]+: .+", line) for line in lines)
    assert lines[0].startswith("[OK] Python: 3.")
    assert "reference kernel" in lines[-2]
    assert lines[-1].startswith("[OK] one real run: works: ")
    for requirement in machine.requirements():
        assert f"[OK] {requirement.name}: {version(requirement.name).split('+')[0]}" in lines


def test_one_broken_check_does_not_hide_the_others(monkeypatch, capsys):
    def broken():
        raise RuntimeError("restart the kernel")

    def silent():
        raise ValueError

    monkeypatch.setattr(machine, "requirements", lambda: [Requirement("no-such-package>=1")])
    monkeypatch.setattr(machine, "cache_folder", broken)
    monkeypatch.setattr(machine, "flash_attention", silent)
    monkeypatch.setattr(machine, "one_run", lambda: Check("one real run", "works"))
    assert machine.report() is False
    printed = capsys.readouterr().out
    assert "[FAIL] no-such-package: not installed\n       fix: pip install" in printed
    assert "[FAIL] checkpoints: not possible\n       fix: restart the kernel" in printed
    assert "[FAIL] FlashAttention here: ValueError: \n       fix: send this report" in printed
    assert "[OK] one real run: works" in printed
    assert printed.splitlines()[-1] == "Please mend the lines marked [FAIL]."
