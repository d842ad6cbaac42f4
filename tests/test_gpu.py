"""On a GPU with flash-attn: FlashAttention-2 itself does what the reference kernel does.

Run with ``pytest -m gpu``: without it the tests hide the GPU.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from helpers import LoadPlan, backend, checkpoints, run
from helpers.probe import Dtypes

NEEDS = "needs a CUDA GPU, shown by `pytest -m gpu`, and the flash_attn package (extra [gpu])"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
        reason=NEEDS,
    ),
]

PLANS = [
    LoadPlan(),
    LoadPlan(dtype="auto"),
    LoadPlan(dtype="float16"),
    LoadPlan(dtype="float32"),
    LoadPlan("fp16"),
    LoadPlan("fp32"),
    LoadPlan("fp32", "bfloat16"),
    LoadPlan("undeclared"),
    LoadPlan("mislabelled", "auto"),
    LoadPlan("overflow", "float16"),
    LoadPlan("overflow", "bfloat16"),
    LoadPlan("fp32", autocast="bfloat16"),
    LoadPlan(dtype="float32", autocast="float16"),
    LoadPlan(default_dtype="float16"),
    LoadPlan(after_load=("float",)),
    LoadPlan(after_load=("lora", "merge")),
    LoadPlan(after_load=("prepare_kbit",)),
]

# A process that sees no GPU takes the reference kernel, also where flash-attn is installed.
REFERENCE = """
import json
from helpers.experiment import LoadPlan, run
from test_gpu import PLANS
print(json.dumps([json.loads(run(plan).to_json()) for plan in PLANS]))
"""


@pytest.fixture(scope="module")
def by_reference(fresh_python):
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests.parent, tests)))
    outcomes = fresh_python(REFERENCE, path=path, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert {outcome["backend"] for outcome in outcomes} == {"reference"}
    return outcomes


@pytest.mark.parametrize("number", range(len(PLANS)), ids=lambda number: str(PLANS[number]))
def test_flash_attention_and_the_reference_kernel_agree(number, by_reference):
    expected, found = by_reference[number], run(PLANS[number])
    assert found.backend == "flash_attn"
    assert (found.ok, found.stage) == (expected["ok"], expected["stage"])
    assert (found.error_type, found.error) == (expected["error_type"], expected["error"])
    assert found.loaded_dtypes == expected["loaded_dtypes"]
    gate = [(record.layer, record.attention_input, record.kernel) for record in found.gate]
    assert gate == [
        (row["layer"], Dtypes(*row["attention_input"]), row["kernel"] and Dtypes(*row["kernel"]))
        for row in expected["gate"]
    ]
    assert found.finite == expected["finite"]
    assert found.text == expected["text"]
    if found.finite:
        # Half-precision logits: two kernels differ by less than each differs from float32.
        assert found.max_logit_gap <= 2 * expected["max_logit_gap"] + 0.05


def test_activate_leaves_flash_attention_to_transformers(monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    found = backend.activate()
    assert (found.name, found.device) == ("flash_attn", "cuda")
    assert torch.cuda.get_device_name() in str(found)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoints.get("bf16"), attn_implementation="flash_attention_2"
    ).to("cuda")
    assert bool(model(torch.tensor([[1, 2, 3]], device="cuda")).logits.isfinite().all())


def test_the_gpus_random_state_is_as_before():
    before = torch.cuda.get_rng_state()
    run(LoadPlan())
    assert torch.equal(torch.cuda.get_rng_state(), before)
