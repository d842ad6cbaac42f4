"""Whatever happens inside run(), the process is afterwards as it was before."""

import logging
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2ForCausalLM,
    masking_utils,
    modeling_utils,
)
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import logging as transformers_logging

from helpers import LoadPlan, PlanError, backend, checkpoints, experiment, run, state
from helpers.reference_kernel import attention as reference
from helpers.steps import STEPS, Step

pytestmark = pytest.mark.usefixtures("one_thread")


def is_busy():
    """Whether another thread would have to wait."""

    def try_it():
        free = state.one_at_a_time.acquire(blocking=False)
        if free:
            state.one_at_a_time.release()
        return not free

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(try_it).result()


def process_state():
    """Everything that a run touches, comparable with ==."""
    loggers = [logging.getLogger(name) for name in ("transformers", "kernels", "peft", None)]
    return {
        "default dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "attention": dict(modeling_utils.ALL_ATTENTION_FUNCTIONS),
        "masks": dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS),
        "flash": {name: vars(flash)[name] for name in dir(flash) if name.startswith("_")},
        "loggers": [(x.level, x.handlers[:], x.propagate, x.disabled) for x in loggers],
        "warnings": (warnings.filters[:], warnings.showwarning),
        "random": torch.random.get_rng_state().tolist(),
        "progress bars": (transformers_logging._tqdm_hook, transformers_logging._tqdm_active),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": torch.get_num_threads(),
        "watchers": list(reference.watchers),
        "busy": is_busy(),
    }


@pytest.fixture
def unusual(monkeypatch):
    """A process whose state is nowhere the default, so that resetting is told from restoring."""
    monkeypatch.setenv("LOCAL_KERNELS", "org/other=/somewhere")
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "level", logging.ERROR)
    monkeypatch.setattr(library, "handlers", [*library.handlers, logging.NullHandler()])
    monkeypatch.setattr(library, "propagate", True)
    modeling_utils.ALL_ATTENTION_FUNCTIONS["their own"] = len
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["their own"] = len
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    before = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args))
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.float16, enabled=False):
        warnings.simplefilter("error", FutureWarning)
        yield
    transformers_logging.set_tqdm_hook(before)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.clear()


def unchanged(plan):
    before = process_state()
    try:
        return run(plan)
    finally:
        after = process_state()
        assert after == before, [name for name in before if after[name] != before[name]]


@pytest.mark.parametrize(
    ("plan", "stage"),
    [
        (LoadPlan(), "done"),
        (LoadPlan(dtype="float16", default_dtype="bfloat16", autocast="bfloat16"), "done"),
        (LoadPlan(attention="eager", after_load=("lora", "merge")), "done"),
        (LoadPlan(dtype="float32", default_dtype="float16"), "forward"),
        (LoadPlan(default_dtype="float16", after_load=("lora", "train")), "done"),
        (LoadPlan("fp32", attention="eager", after_load=("lora", "merge", "reload")), "done"),
    ],
    ids=str,
)
def test_after_a_run(unusual, plan, stage):
    assert unchanged(plan).stage == stage


def test_after_a_step_that_fails(unusual, monkeypatch):
    def fail(_model, _context):
        os.environ["LEFT_BEHIND"] = "1"
        raise RuntimeError("half-way")

    monkeypatch.setitem(STEPS, "half", Step(fail, ()))
    found = unchanged(LoadPlan(default_dtype="float16", after_load=("half",)))
    assert (found.stage, found.error) == ("after_load", "half-way")


def test_after_a_load_that_fails(unusual):
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    checkpoints.edit_config(folder, model_type="nonsense")
    assert unchanged(LoadPlan(folder, default_dtype="float16")).stage == "load"


def test_after_a_plan_that_is_wrong(unusual):
    for plan in (LoadPlan("nowhere"), LoadPlan(question="")):
        with pytest.raises(PlanError):
            unchanged(plan)


def interrupt(*_args, **_kwargs):
    signal.raise_signal(signal.SIGINT)  # what Ctrl-C and JupyterLab's stop button send
    raise AssertionError("the handler has not raised KeyboardInterrupt")


@pytest.mark.parametrize("where", ["reference run", "load", "step", "forward", "generate"])
def test_after_an_interrupt(unusual, monkeypatch, where):
    plan = LoadPlan(default_dtype="float16", autocast="bfloat16", after_load=("half",))
    if where == "reference run":
        experiment._reference_logits.cache_clear()
    else:
        run(plan)  # keeps the reference
    if where in ("reference run", "load"):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupt)
    elif where == "step":
        monkeypatch.setitem(STEPS, "half", Step(interrupt, ()))
    elif where == "forward":
        monkeypatch.setattr(reference, "watchers", [interrupt])
    else:
        monkeypatch.setattr(Qwen2ForCausalLM, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unchanged(plan)
    monkeypatch.undo()
    assert run(plan).ok


def test_two_threads_do_not_meet():
    """The default dtype and the log handlers belong to the process: runs take turns."""
    from concurrent.futures import ThreadPoolExecutor

    plans = [
        LoadPlan("undeclared", default_dtype="float16"),
        LoadPlan(dtype="float32", default_dtype="bfloat16"),
    ] * 3
    before = process_state()
    alone = [run(plan) for plan in plans[:2]]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(run, plans))
    for number, found in enumerate(together):
        expected = alone[number % 2]
        assert (found.loaded_dtypes, found.error, found.text, found.logs, found.gate) == (
            expected.loaded_dtypes,
            expected.error,
            expected.text,
            expected.logs,
            expected.gate,
        )
    assert process_state() == before


def test_runs_do_not_depend_on_the_random_state():
    """LoRA's start is drawn at random; two runs of one plan draw the same."""
    drawn = []

    def draw(model, _):
        drawn.append(torch.rand(3).tolist())
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STEPS, "draw", Step(draw, ()))
        for seed in (1, 2):
            torch.manual_seed(seed)
            run(LoadPlan(attention="sdpa", after_load=("draw",)))
            assert torch.initial_seed() == seed
    assert drawn[0] == drawn[1]


names = st.text(st.characters(codec="ascii", categories=["Lu"]), min_size=1, max_size=8)
values = st.dictionaries(names.map("DTYPE_GUIDE_TEST_".__add__), names, max_size=4)


@given(values, values)
def test_environment_is_put_back_exactly(before, inside):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in before.items():
            patch.setenv(name, value)
        environment = dict(os.environ)
        with pytest.raises(ZeroDivisionError), state.as_before():  # noqa: PT012
            for name in before:
                del os.environ[name]
            os.environ.update(inside)
            raise ZeroDivisionError
        assert dict(os.environ) == environment
        for name in inside:
            if name not in before:
                assert name not in os.environ


def forward(checkpoint, **arguments):
    """The user's own two lines; True if the logits are finite."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **arguments)
    inputs = AutoTokenizer.from_pretrained(checkpoint)("Hello", return_tensors="pt")
    return bool(model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("plan", [LoadPlan(), LoadPlan(dtype="float32")], ids=str)
def test_users_own_lines_work_after_activate_and_run(plan, monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    backend.activate()
    unchanged(plan)
    assert forward(checkpoints.get("bf16"), attn_implementation="flash_attention_2")
    unchanged(plan)
    assert forward(checkpoints.get("fp16"), attn_implementation="flash_attention_2")
