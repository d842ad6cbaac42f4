"""The three backends, and the override that switches the reference kernel on."""

import ntpath
import os
import posixpath
import shutil
from pathlib import Path

import kernels
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.utils import import_utils

from helpers import backend, checkpoints

FLASH_ATTN_2 = "kernels-community/flash-attn2"
FAILED = (
    "FlashAttention failed to load earlier in this Python process, and Transformers keeps that"
    " state: restart the kernel, then call activate() before from_pretrained."
)


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends what the machine has."""

    def pretend(gpu=None, capability=(8, 0), flash_attn=None, hub=False, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            import_utils, "is_flash_attn_2_available", lambda: flash_attn is not None
        )
        monkeypatch.setattr(backend, "version", {"flash_attn": flash_attn}.__getitem__)

        def has_kernel(repository, *, version):
            assert repository == FLASH_ATTN_2
            assert isinstance(version, int)
            if isinstance(hub, Exception):
                raise hub
            return hub

        monkeypatch.setattr(kernels, "has_kernel", has_kernel)
        backend.detect.cache_clear()

    assert flash_utils.FLASH_ATTN_KERNEL_VERSIONS  # imported before anything is pretended
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    yield pretend
    backend.detect.cache_clear()


A100, T4 = "NVIDIA A100-SXM4-40GB", "Tesla T4"
NO_NETWORK = OSError("Name or service not known")


@pytest.mark.parametrize(
    ("has", "name", "device", "said"),
    [
        ({}, "reference", "cpu", "No CUDA GPU"),
        ({"flash_attn": "2.8.3"}, "reference", "cpu", "No CUDA GPU"),
        ({"gpu": A100, "flash_attn": "2.8.3"}, "flash_attn", "cuda", "flash-attn 2.8.3"),
        ({"gpu": A100, "flash_attn": "2.8.3", "hub": True}, "flash_attn", "cuda", A100),
        ({"gpu": A100, "hub": True}, "hub-kernel", "cuda", FLASH_ATTN_2),
        ({"gpu": A100, "hub": False}, "reference", "cpu", "flash-attn and the kernel hub are not"),
        ({"gpu": A100, "hub": NO_NETWORK}, "reference", "cpu", A100),
        ({"gpu": T4, "capability": (7, 5), "hub": True}, "reference", "cpu", f"{T4} is older"),
        (
            {"gpu": "Radeon", "capability": (7, 0), "hub": True, "hip": "6.4"},
            "reference",
            "cpu",
            "Radeon is here, but flash-attn is not",
        ),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_backend_is_what_the_machine_has(machine, has, name, device, said):
    machine(**has)
    found = backend.activate()
    assert (found.name, found.device) == (name, device)
    sentence = str(found)
    assert said in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert "\n" not in sentence
    # A CPU's numbers are never to be taken for FlashAttention's.
    assert ("reference kernel" in sentence) == (name == "reference")
    assert ("speed and memory are not FlashAttention's" in sentence) == (name == "reference")
    assert ("LOCAL_KERNELS" in os.environ) == (name == "reference")


def test_flash_attn_on_a_gpu_that_it_refuses_gets_a_way_out(machine):
    machine(gpu=T4, capability=(7, 5), flash_attn="2.8.3")
    with pytest.raises(RuntimeError, match=r"refuses this GPU .*set CUDA_VISIBLE_DEVICES=-1"):
        backend.activate()
    assert "LOCAL_KERNELS" not in os.environ
    assert backend.detect().device == "cuda"  # sdpa, the way out on such a GPU, goes on


def test_our_own_override_from_a_parent_process_is_not_the_hub(machine, monkeypatch):
    machine(gpu=A100, hub=True)
    monkeypatch.setenv("LOCAL_KERNELS", f"org/x=/y:{FLASH_ATTN_2}={backend.KERNEL_FOLDER}")
    assert backend.detect().name == "reference"
    backend.detect.cache_clear()
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH_ATTN_2}=/another/kernel")
    assert backend.detect().name == "hub-kernel"


def test_activate_is_idempotent_and_keeps_foreign_overrides(machine, monkeypatch):
    machine()
    monkeypatch.setenv("LOCAL_KERNELS", "org/other=/a=b")
    before = dict(os.environ)
    assert backend.activate() == backend.activate()
    once = f"org/other=/a=b:{FLASH_ATTN_2}={backend.KERNEL_FOLDER}"
    assert dict(os.environ) == {**before, "LOCAL_KERNELS": once}


names = st.from_regex(r"[a-z0-9-]+/[a-z0-9-]+", fullmatch=True)
paths = st.text(st.characters(exclude_characters=":", categories=["L", "N", "P", "Zs"]), min_size=1)


@given(st.dictionaries(names, paths), names, paths, paths)
@example({"a/b-c": "/other"}, "a/b", "/earlier", "/path")
def test_override_read_as_kernels_reads_it(others, repository, earlier, path):
    def variable(overrides):
        return ":".join(f"{name}={folder}" for name, folder in overrides.items())

    for value in (variable({**others, repository: earlier}), variable(others), ""):
        written = backend.override(repository, path, value)
        # The format: kernels/load.py splits at ":", then at the first "=".
        read = [entry.split("=", 1) for entry in written.split(":")]
        assert dict(read) == {**(others if value else {}), repository: path}
        assert len(read) == len(dict(read))
        assert backend.override(repository, path, written) == written


WINDOWS = r"C:\Users\me\the guide\helpers\reference_kernel"


@pytest.mark.parametrize(
    ("cwd", "expected"),
    [
        (r"C:\Users\me\the guide", r"helpers\reference_kernel"),
        (r"C:\Users\me\the guide\notebooks", r"..\helpers\reference_kernel"),
        (r"c:\users\ME", r"the guide\helpers\reference_kernel"),
        ("C:\\", r"Users\me\the guide\helpers\reference_kernel"),
    ],
)
def test_windows_folder_becomes_relative(cwd, expected):
    path = backend.kernel_path(WINDOWS, cwd, ntpath)
    assert path == expected
    assert ntpath.normcase(ntpath.normpath(ntpath.join(cwd, path))) == ntpath.normcase(WINDOWS)
    entry = backend.override(FLASH_ATTN_2, path, "")
    assert entry.split(":") == [f"{FLASH_ATTN_2}={expected}"]


@pytest.mark.parametrize(
    ("folder", "cwd", "flavour"),
    [
        (WINDOWS, "D:\\work", ntpath),
        (WINDOWS, r"\\server\share", ntpath),
        ("/srv/a:b/helpers/reference_kernel", "/srv", posixpath),
        ("/srv/a/helpers:2/reference_kernel", "/srv/a", posixpath),
    ],
)
def test_folder_that_the_variable_cannot_name_is_one_sentence(folder, cwd, flavour):
    with pytest.raises(RuntimeError) as caught:
        backend.kernel_path(folder, cwd, flavour)
    sentence = str(caught.value)
    assert repr(folder) in sentence
    assert repr(cwd) in sentence
    assert "move the guide to a path without a colon" in sentence


@pytest.mark.parametrize(
    ("folder", "cwd", "flavour", "expected"),
    [
        ("/srv/guide/reference_kernel", "/", posixpath, "/srv/guide/reference_kernel"),
        (r"\\server\share\kernel", "C:\\", ntpath, r"\\server\share\kernel"),
        ("/srv/a:b/helpers/kernel", "/srv/a:b/notebooks", posixpath, "../helpers/kernel"),
    ],
)
def test_folder_that_the_variable_can_name(folder, cwd, flavour, expected):
    assert backend.kernel_path(folder, cwd, flavour) == expected


FRESH = """
import json, os, sys
guide, tests, checkpoint = sys.argv[1:]
sys.path[:0] = [guide, tests]
import helpers
from helpers import LoadPlan, backend, run
from test_state import flash, forward, process_state

own = {"attn_implementation": "flash_attention_2"}
found = {"file": helpers.__file__, "loaded": flash._loaded_implementation}

before = process_state()
plans = LoadPlan(checkpoint), LoadPlan(checkpoint, "float32"), LoadPlan(checkpoint, "auto")
found["ok"] = [run(plan).ok for plan in plans]
after = process_state()
found["changed"] = [name for name in before if after[name] != before[name]]

backend.activate()
found["variable"] = [os.environ["LOCAL_KERNELS"]]
os.chdir("notebooks")
backend.activate()
found["variable"].append(os.environ["LOCAL_KERNELS"])
found["own"] = [forward(checkpoint, **own)]
outcome = run(plans[1])
found["error"], found["frames"] = outcome.error, outcome.frames
found["own"].append(forward(checkpoint, **own))
print(json.dumps(found))
"""


def test_fresh_process_in_a_folder_that_the_variable_cannot_name(fresh_python, tmp_path):
    """run() before any activate() leaves nothing behind; then activate(), another current folder,
    activate() again, and the user's own lines load the kernel."""
    guide = tmp_path / ("guide" if os.name == "nt" else "guide: the 2nd")  # C: has a colon anyway
    source = backend.KERNEL_FOLDER.parent
    shutil.copytree(source, guide / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    (guide / "notebooks").mkdir()

    tests, checkpoint = Path(__file__).parent, checkpoints.get("bf16")
    unset = ["LOCAL_KERNELS"]
    found = fresh_python(FRESH, guide, tests, checkpoint, cwd=guide, path="", unset=unset)
    assert found["file"].startswith(str(guide))
    assert found["loaded"] is None
    assert found["ok"] == [True, False, True]
    assert found["changed"] == []
    relative = [Path(start, "helpers", "reference_kernel") for start in ("", "..")]
    assert found["variable"] == [f"{FLASH_ATTN_2}={path}" for path in relative]
    assert found["own"] == [True, True]
    assert found["error"] == "FlashAttention only support fp16 and bf16 data type"
    assert any("modeling_flash_attention_utils.py" in frame for frame in found["frames"])


FAIL_TO_LOAD = """
import json, sys
from pathlib import Path
from helpers import LoadPlan, backend, checkpoints, run
from helpers.errors import PlanError
from transformers import AutoModelForCausalLM

found = {}
outcome = run(LoadPlan("org/talker", dtype="auto"))
found["cached"] = [outcome.ok, outcome.text, outcome.file_dtypes, outcome.declared_dtype]
try:
    run(LoadPlan("org/nothing"))
except PlanError as error:
    found["absent"] = str(error)

def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]

bf16 = checkpoints.get("bf16")
fa2 = {"attn_implementation": "flash_attention_2"}
found["plain"] = attempt(AutoModelForCausalLM.from_pretrained, bf16, **fa2)
found["again"] = attempt(AutoModelForCausalLM.from_pretrained, bf16, **fa2)
found["activate"] = attempt(backend.activate)
found["run"] = attempt(run, LoadPlan())
print(json.dumps(found))
"""


def test_offline_process(fresh_python, tmp_path):
    """A hub id from the Hugging Face cache, one that is nowhere, and FlashAttention that failed to
    load; in one process because each costs the import of two big libraries."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--org--talker"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoints.get("mislabelled"), hub / "snapshots" / commit)

    found = fresh_python(
        FAIL_TO_LOAD,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        unset=["LOCAL_KERNELS", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"],
    )
    ok, text, file_dtypes, declared = found["cached"]
    assert ok, text
    assert (list(file_dtypes), declared) == (["float32"], "bfloat16")
    assert found["absent"].startswith("'org/nothing' is neither a folder")
    assert "OfflineModeIsEnabled" in found["absent"]

    # Transformers itself: the first load fails, the second one pretends to work.
    assert found["plain"][0] in {"ImportError", "ValueError"}, found["plain"]
    assert found["again"] is None
    assert found["activate"] == ["RuntimeError", FAILED]
    assert found["run"] == ["RuntimeError", FAILED]
