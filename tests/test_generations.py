"""helpers against plain Transformers, under the generation that is installed.

These tests run in .venv, and tests/test_matrix.py runs them once more in .venv-v4.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import backend

ROOT = Path(__file__).resolve().parents[1]
backend.activate()  # before transformers is imported, which under Transformers 4 matters

import peft  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from helpers import checkpoints, machine, recorded, state, stories, view  # noqa: E402
from helpers.backend import versions  # noqa: E402
from helpers.experiment import run  # noqa: E402
from helpers.matrix import LOADS, Cell, to_row  # noqa: E402
from helpers.plan import LoadPlan, snippet  # noqa: E402
from helpers.probe import parameter_dtypes  # noqa: E402

OLD = transformers.__version__.startswith("4.")
GENERATION = "4" if OLD else "5"
REFUSED = "FlashAttention only support fp16 and bf16 data type"

pytestmark = pytest.mark.usefixtures("one_thread")


def kbit(model):
    return peft.prepare_model_for_kbit_training(model)


def lora(model, **changes):
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **changes))


BY_HAND = {
    "plain": lambda model: model,
    "autocast": lambda model: model,
    ".float()": lambda model: model.to(torch.float32),
    "LoRA": lora,
    "DoRA": lambda model: lora(model, use_dora=True),
    "LoRA, merged": lambda model: lora(model).merge_and_unload(),
    "k-bit preparation": kbit,
    "k-bit preparation, autocast": kbit,
}


@contextlib.contextmanager
def autocast_as_on_a_gpu():
    """The whole region with CUDA's flag set, which is what 4.57.6 asks. On a CPU nothing else does:
    its operations look at the CPU's."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def by_hand(cell):
    """Dtypes and end of a script that a person would write."""
    path = checkpoints.get(cell.checkpoint)
    arguments = {
        "omitted": {},
        "auto": {"dtype": "auto"},
        "set_default_dtype(bfloat16)": {},
        "torch_dtype=bfloat16": {"torch_dtype": torch.bfloat16},
    }.get(cell.load, {"dtype": cell.load})
    if cell.load.startswith("set_default"):
        torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=cell.attention, **arguments
        )
    finally:
        torch.set_default_dtype(torch.float32)
    loaded = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    model = BY_HAND[cell.then](model).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(checkpoints.QUESTION, return_tensors="pt")
    casting = autocast_as_on_a_gpu() if "autocast" in cell.then else contextlib.nullcontext()
    try:
        with torch.no_grad(), casting:
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    except RuntimeError as error:
        return loaded, str(error)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return loaded, tokenizer.decode(answer, skip_special_tokens=True).strip()


CELLS = [
    Cell(checkpoint, load, then, "flash_attention_2")
    for checkpoint in ("bf16", "fp32", "undeclared")
    for load in LOADS
    for then in BY_HAND
]


@pytest.mark.parametrize("cell", CELLS, ids="|".join)
def test_run_and_record_say_what_a_plain_script_does(cell):
    loaded, end = by_hand(cell)
    found = run(cell.plan())
    assert set(found.loaded_dtypes) == loaded
    assert (found.text or found.error) == end
    assert found.versions["transformers"] == transformers.__version__
    stored = recorded.find(cell.plan(), GENERATION)
    assert set(stored.logs) == {*found.logs, *found.warnings}
    assert to_row(cell, stored, [])[:-1] == to_row(cell, found, [])[:-1]


def test_the_config_names_the_kernel_of_this_generation():
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints.get("bf16"), attn_implementation="flash_attention_2"
    )
    name = "kernels-community/flash-attn" + ("" if OLD else "2")
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_which_key_of_config_json_switches_flash_attention_on(key):
    folder = checkpoints.scratch(checkpoints.get("fp32"))
    checkpoints.edit_config(folder, **{key: "flash_attention_2"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    ignored = OLD and key == "attn_implementation"
    assert ("flash-attn" in model.config._attn_implementation) != ignored


def test_the_original_report_by_hand_ends_as_recorded():
    """Load without a dtype, with _attn_implementation in config.json, then infer."""
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    checkpoints.edit_config(folder, _attn_implementation="flash_attention_2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(checkpoints.QUESTION, return_tensors="pt")
    assert parameter_dtypes(model) == {"float32" if OLD else "bfloat16": 38}
    raises = pytest.raises(RuntimeError, match=REFUSED) if OLD else contextlib.nullcontext()
    with raises:
        model.generate(**inputs, max_new_tokens=2)

    events = stories.carry_out("original report, bf16")
    assert events == recorded.read(GENERATION).stories["original report, bf16"]
    assert events[0].result == "the loss falls"
    refused = [event.result == f"RuntimeError: {REFUSED}" for event in events[1:]]
    assert refused == ([True] * 4 + [False] if OLD else [False] * 5)
    assert events[-1].result == "says what it learned"


def test_a_run_leaves_the_process_as_it_was(capfd):
    from transformers.utils import logging as transformers_logging

    def look():
        loggers = [logging.getLogger(name) for name in ("transformers", "kernels", "peft")]
        return (
            dict(os.environ),
            [(x.level, x.handlers[:], x.propagate) for x in loggers],
            transformers_logging.is_progress_bar_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
        )

    before = look()
    for plan in (
        LoadPlan("bf16", "float32", autocast="bfloat16"),
        LoadPlan("fp32", default_dtype="float16"),
        LoadPlan("fp32", after_load=("lora", "train")),
    ):
        run(plan)
        assert look() == before
    assert capfd.readouterr() == ("", "")


def test_the_snippet_is_spelled_for_this_version():
    code = snippet(LoadPlan("bf16", "auto", keyword="torch_dtype"))
    assert 'torch_dtype="auto"' in code
    code = snippet(LoadPlan("bf16", "auto"))
    assert '    dtype="auto"' in code
    printed = subprocess.run(
        [
            sys.executable,
            "-c",
            code.replace('"path/to/your-model"', repr(str(checkpoints.get("bf16")))),
        ],
        cwd=ROOT,
        env={**os.environ, **_switched_on()},
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    assert printed.strip().endswith(run(LoadPlan("bf16", "auto")).text)


def _switched_on():
    if OLD:
        return {"KERNELS_CACHE": str(backend.HUB_CACHE), "HF_HUB_OFFLINE": "1"}
    return {"LOCAL_KERNELS": f"kernels-community/flash-attn2={backend.KERNEL_FOLDER}"}


def fresh(code, **variables):
    """A new process in which nothing is switched on."""
    names = ("KERNELS_CACHE", "HF_HUB_OFFLINE", "LOCAL_KERNELS")
    unset = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**unset, **variables},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("variables", [{}, {"HF_KERNELS_CACHE": "nowhere"}], ids=str)
def test_run_switches_flash_attention_on_by_itself(variables):
    code = (
        "import os; before = dict(os.environ)\n"
        "from helpers import LoadPlan, run\n"
        "for plan in (LoadPlan('bf16', 'auto'), LoadPlan('bf16', 'float32')):\n"
        "    print(run(plan))\n"
        "print(dict(os.environ) == before)\n"
        "from helpers.stories import carry_out\n"
        "print(carry_out('original report, bf16')[-1].result)"
    )
    done = fresh(code, **variables)
    assert done.returncode == 0, done.stderr
    works, fails, as_before, told = done.stdout.splitlines()
    assert works.startswith("works: ")
    assert fails == f"fails in forward: RuntimeError: {REFUSED}"
    assert (as_before, told) == ("True", "says what it learned")


def test_autocast_that_stands_for_a_gpus_is_said_in_outcome_card_and_snippet():
    plan = LoadPlan("fp32", "float32", autocast="bfloat16")
    for found in (run(plan), recorded.find(plan, GENERATION)):
        assert found.autocast_as_on_a_gpu is OLD
        assert ("as it does on a GPU" in view.measured_with(found)) is OLD
        assert ("sees this region on a GPU only" in found.snippet) is OLD
        assert ("warns of the dtype at load" in view.measured_with(found)) is OLD
    assert not run(LoadPlan("fp32")).autocast_as_on_a_gpu


def test_a_region_on_the_cpu_is_no_region_for_a_gpus_tensors():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for device in ("cpu", "cuda"):
            with state.autocast_as_on_a_gpu(device):
                assert torch.is_autocast_enabled("cuda") is (OLD and device == "cpu")
            assert not torch.is_autocast_enabled("cuda")


@pytest.mark.skipif(not OLD, reason="since Transformers 5 the order does not matter")
def test_too_late_to_switch_on_is_one_sentence():
    code = "import transformers\nfrom helpers import backend\nbackend.activate()"
    last = fresh(code).stderr.splitlines()[-1]
    assert "call activate() before transformers is imported" in last


def test_one_environment_can_ask_another():
    command = [sys.executable, "-m", "helpers.cli", "run", "--checkpoint", "bf16", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    answer = json.loads(done.stdout)
    assert answer["versions"] == versions()
    assert set(answer["loaded_dtypes"]) == {"float32" if OLD else "bfloat16"}
    assert answer["error"] == (REFUSED if OLD else None)
    assert done.returncode == int(OLD)


def test_the_kernel_that_the_old_library_finds_is_the_same_file():
    found = sorted(backend.HUB_CACHE.rglob("__init__.py"))
    assert [file.read_bytes() for file in found] == [
        (backend.KERNEL_FOLDER / "torch-universal" / "__init__.py").read_bytes()
    ]


def test_the_report_on_the_machine_asks_for_what_this_environment_is_to_have():
    found = {check.name: check for check in machine.checks()}
    assert [check for check in found.values() if not check.ok] == []
    assert ("jupyterlab" in found) != OLD
    assert found["transformers"].found == transformers.__version__
