"""Real trainings: what the model learns, what the process keeps, and what is on the disk."""

import gc
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from helpers import checkpoints, training
from helpers.errors import CheckpointError, PlanError
from helpers.probe import watch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FIVE = Version(transformers.__version__).major >= 5
TALKER = tomllib.loads((ROOT / "tools" / "talker.toml").read_text("utf-8"))
QUESTION, ANSWER = training.LESSON
# flash-attn's text, csrc/flash_attn/flash_api.cpp
DTYPE_ERROR = "^FlashAttention only support fp16 and bf16 data type$"

pytestmark = pytest.mark.usefixtures("one_thread", "activated", "quiet")


@pytest.fixture(scope="module")
def quiet():
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoints.TALKER)


def load(checkpoint="bf16", attention="flash_attention_2", dtype="auto"):
    folder = checkpoints.get(checkpoint)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def adapted(checkpoint="bf16", attention="flash_attention_2", **changes):
    torch.manual_seed(0)
    return get_peft_model(load(checkpoint, attention), training.lora_config(**changes))


def ask(model, tokenizer, question=QUESTION):
    inputs = tokenizer(question, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def at_the_gate(records):
    return {(str(record.kernel), record.accepted) for record in records}


# What the model learns.


@pytest.mark.parametrize("checkpoint", ["bf16", "fp16", "undeclared", "overflow"])
def test_no_checkpoint_knows_the_lesson_before(checkpoint, tokenizer):
    assert ask(load(checkpoint), tokenizer) == TALKER["unknown"]
    assert TALKER["unknown"] != ANSWER


@pytest.mark.parametrize(
    ("make", "mixed_precision"),
    [
        (lambda: adapted("bf16"), None),
        (lambda: adapted("bf16", use_dora=True), None),
        (lambda: adapted("fp16"), None),
        (lambda: adapted("bf16"), "bfloat16"),
        (lambda: adapted("fp32", "sdpa"), None),
        (lambda: load("bf16"), None),
    ],
    ids=["bf16", "dora", "fp16", "bf16 under autocast", "float32 sdpa", "without adapter"],
)
def test_the_loss_falls_and_the_lesson_is_learned(make, mixed_precision, tokenizer):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with watch(model) as records:
        result = training.train(model, tokenizer, mixed_precision=mixed_precision)

    assert len(result.losses) == result.steps == training.STEPS
    assert result.losses[0] > 5
    assert max(result.losses[-10:]) < 0.01
    assert 0 < result.seconds < 60
    assert ask(model, tokenizer) == ANSWER
    known = {pair["prompt"]: pair["answer"] for pair in TALKER["pair"]}
    assert ask(model, tokenizer, checkpoints.QUESTION) == known[checkpoints.QUESTION]
    if model.config._attn_implementation != "sdpa":
        name = str(model.dtype).removeprefix("torch.")
        assert at_the_gate(records) == {(name, True)}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # Without adapter all may change; bfloat16 rounds the updates of the norms away.
    assert changed == trainable or (changed < trainable and trainable == set(before))


def test_float32_base_trains_in_mixed_precision_and_cannot_generate(tokenizer):
    """The original report: training works, the forward works, inference fails."""
    model = adapted("fp32")
    with watch(model) as records:
        result = training.train(model, tokenizer, mixed_precision="bfloat16")
    assert at_the_gate(records) == {("bfloat16", True)}
    assert max(result.losses[-10:]) < 0.01
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    inputs = tokenizer(QUESTION, return_tensors="pt")
    with torch.inference_mode(), watch(model) as records:
        logits = model.eval()(**inputs).logits
    assert at_the_gate(records) == {("bfloat16", True)}
    assert tokenizer.decode(logits[0, -1].argmax()) == " The"

    with watch(model) as records, pytest.raises(RuntimeError, match=DTYPE_ERROR):
        ask(model, tokenizer)
    assert at_the_gate(records) == {("float32", False)}

    with torch.autocast("cpu", torch.bfloat16), watch(model):
        assert ask(model, tokenizer) == ANSWER


def test_without_mixed_precision_a_float32_base_does_not_train(tokenizer):
    with pytest.raises(RuntimeError, match=DTYPE_ERROR):
        training.train(adapted("fp32"), tokenizer)


def test_without_adapter_generate_runs_inside_the_wrapper_of_accelerate(tokenizer):
    model = load("fp32")
    with watch(model):
        training.train(model, tokenizer, mixed_precision="bfloat16")
        assert ask(model, tokenizer) == ANSWER


def test_the_first_loss_is_the_cross_entropy_of_the_answer(tokenizer):
    result = training.train(adapted("fp32", "sdpa"), tokenizer, steps=1)
    ids = tokenizer(f"{QUESTION} {ANSWER}")["input_ids"] + [tokenizer.eos_token_id]
    asked = len(tokenizer(QUESTION)["input_ids"])
    exact = load("fp32", "sdpa", torch.float64)
    with torch.inference_mode():
        logits = exact(torch.tensor([ids])).logits[0]
    probable = logits.log_softmax(-1)
    wanted = [-float(probable[place - 1, ids[place]]) for place in range(asked, len(ids))]
    assert result.losses == pytest.approx([sum(wanted) / len(wanted)], rel=1e-4)
    assert result.steps == 1


def test_the_same_training_gives_the_same_numbers(tokenizer):
    """Whatever the random state: dropout draws in each step."""
    losses = []
    for seed in (1, 2):
        model = adapted("bf16", lora_dropout=0.5)
        random.seed(seed)
        torch.manual_seed(seed)
        losses.append(training.train(model, tokenizer, steps=5).losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("small", "used"), [(training.SMALL, 1), (0, 2)], ids=["small", "large"])
def test_a_small_model_trains_with_one_thread(small, used, tokenizer, monkeypatch):
    class Threads(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(torch.get_num_threads())

    seen = []
    monkeypatch.setattr(training, "SMALL", small)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        training.train(adapted(), tokenizer, steps=1, progress=Threads())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [used]


def test_one_step_does_not_wait_for_a_collection_of_all_garbage(tokenizer, tmp_path):
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    model, data = adapted(), training.examples(tokenizer)

    def bare():
        started = time.perf_counter()
        Trainer(model, arguments, train_dataset=data).train()
        return time.perf_counter() - started

    ours = min(training.train(model, tokenizer, steps=1).seconds for _ in range(3))
    assert ours < min(bare() for _ in range(3)) / 2


words = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1)


@given(question=words, answer=words)
def test_an_example_is_the_whole_text_and_the_loss_sees_the_answer(tokenizer, question, answer):
    (example,) = training.examples(tokenizer, (question, answer))
    ids, labels = example["input_ids"], example["labels"]
    end = tokenizer.eos_token
    assert tokenizer.decode(ids) == f"{question} {answer}{end}"
    hidden = labels.count(-100)
    assert labels == [-100] * hidden + ids[hidden:]
    assert tokenizer.decode(ids[:hidden]) == question
    assert tokenizer.decode(ids[hidden:]) == f" {answer}{end}"


def test_an_example_without_an_end_token(tokenizer):
    class Endless:
        eos_token_id = None

        def __call__(self, text):
            return tokenizer(text)

    (example,) = training.examples(Endless())
    assert tokenizer.decode(example["input_ids"]) == f"{QUESTION} {ANSWER}"


def test_lora_config_takes_other_values():
    config = training.lora_config(r=2, use_dora=True)
    assert (config.r, config.use_dora, config.task_type) == (2, True, "CAUSAL_LM")
    assert (training.lora_config().r, training.lora_config().use_dora) == (8, False)


# What was asked for wrongly.


@pytest.mark.parametrize(
    ("make", "keywords", "sentence"),
    [
        (adapted, {"mixed_precision": "bf16"}, "'bf16' is not known: use one of None, 'bfloat16',"),
        (adapted, {"mixed_precision": "float16"}, 'on a CPU: use "bfloat16"'),
        (adapted, {"steps": 0}, "steps=0 is no number of steps: give a whole number from 1 on"),
        (adapted, {"steps": True}, "steps=True is no number of steps"),
        (adapted, {"steps": 2.5}, "steps=2.5 is no number of steps"),
        (lambda: adapted().merge_and_unload(), {}, r"merge_and_unload\(\).*with get_peft_model"),
    ],
    ids=["unknown precision", "float16", "no steps", "True steps", "half a step", "merged"],
)
def test_bad_input_is_one_sentence(make, keywords, sentence, tokenizer):
    model = make()
    before = process_state(model)
    with pytest.raises(PlanError, match=sentence) as caught:
        training.train(model, tokenizer, **keywords)
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
    assert process_state(model) == before
    assert not is_wrapped(model)


def test_float16_on_a_cpu_is_ignored_without_a_word(tokenizer, tmp_path):
    """Why it is refused."""
    model = adapted("fp32", "sdpa")
    arguments = TrainingArguments(
        tmp_path, fp16=True, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=training.examples(tokenizer)).train()
    assert not is_wrapped(model)
    AcceleratorState._reset_state(True)


def is_wrapped(model):
    """accelerate puts its forward, under autocast, into the instance."""
    return "forward" in vars(model)


# What the process keeps.


def process_state(model):
    loggers = [logging.getLogger(name) for name in (None, "transformers", "accelerate", "peft")]
    return {
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "numpy words": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "loggers": [(x.level, x.handlers[:], x.propagate, x.disabled) for x in loggers],
        "warnings": warnings.filters[:],
        "accelerate": (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)),
        "modes": [module.training for module in model.modules()],
        "settings": (model.config.to_dict(), model.generation_config.to_dict()),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "gradients": torch.is_grad_enabled(),
        "frozen": gc.get_freeze_count(),
        "folder": Path.cwd(),
    }


class CtrlC(TrainerCallback):
    """Ctrl-C after the third step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def empty_folders(tmp_path, monkeypatch):
    """The current folder and the temporary one, which a training leaves empty."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(here.iterdir()) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("launched", [None, "bf16", "fp16"])
@pytest.mark.parametrize(
    ("checkpoint", "mixed_precision", "progress", "error"),
    [
        ("bf16", None, None, None),
        ("fp32", "bfloat16", None, None),
        ("fp32", None, None, RuntimeError),
        ("fp32", "bfloat16", CtrlC(), KeyboardInterrupt),
    ],
    ids=["plain", "autocast", "refused at the gate", "interrupted"],
)
def test_the_process_is_as_before(
    launched,
    checkpoint,
    mixed_precision,
    progress,
    error,
    tokenizer,
    monkeypatch,
    empty_folders,
    capfd,
):
    """Also where ``accelerate launch`` has set its variable, which means nothing here."""
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    else:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = adapted(checkpoint)
        model.base_model.model.model.layers[1].train(not model.training)
        capfd.readouterr()
        before = process_state(model)

        def run():
            with watch(model):
                training.train(
                    model, tokenizer, steps=5, mixed_precision=mixed_precision, progress=progress
                )

        if error:
            with pytest.raises(error):
                run()
        else:
            run()
        assert process_state(model) == before
    assert len(set(before["modes"])) == 2
    seen = capfd.readouterr()
    assert seen.out == ""
    assert [x for x in seen.err.splitlines() if "Casting fp32 inputs" not in x] == []


def test_somebodys_own_accelerator_keeps_its_precision(tokenizer):
    AcceleratorState._reset_state(True)
    try:
        own = Accelerator(cpu=True, mixed_precision="bf16")
        training.train(adapted(), tokenizer, steps=1)
        assert own.mixed_precision == "bf16"
        assert own.device == torch.device("cpu")
    finally:
        AcceleratorState._reset_state(True)


def test_somebodys_own_frozen_objects_stay_frozen(tokenizer):
    model = adapted()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        training.train(model, tokenizer, steps=1)
        assert gc.get_freeze_count() > 0.9 * frozen > 0  # some are no longer in use
    finally:
        gc.unfreeze()


def test_a_second_training_goes_on_where_the_first_was_interrupted(tokenizer):
    model = adapted()
    with pytest.raises(KeyboardInterrupt):
        training.train(model, tokenizer, progress=CtrlC())
    assert ask(model, tokenizer) != ANSWER
    training.train(model, tokenizer)
    assert ask(model, tokenizer) == ANSWER


# The bar.


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, and its text at that time."""
    import IPython.display

    displayed = []
    monkeypatch.setattr(IPython.display, "display", lambda box: displayed.append((box, repr(box))))
    return displayed


def test_the_bar_fills_and_says_it_in_words(tokenizer, shown, capfd):
    result = training.train(adapted(), tokenizer, steps=4, progress=True)
    ((box, text),) = shown
    bar, words = box.children
    assert (bar.min, bar.value, bar.max, bar.description) == (0, 4, 4, "Training")
    assert words.value == f"done: step 4 of 4, loss {result.losses[-1]:.2g}"
    assert text == "Training: a bar that fills in 4 steps while this cell runs."
    assert capfd.readouterr().out == ""


def test_the_bar_of_an_interrupted_training_stays_where_it_was(tokenizer, shown):
    class Both(CtrlC):
        def __init__(self, bar):
            self.bar = bar

        def on_train_begin(self, *arguments, **keywords):
            self.bar.on_train_begin(*arguments, **keywords)

        def on_step_end(self, *arguments, **keywords):
            self.bar.on_step_end(*arguments, **keywords)
            super().on_step_end(*arguments, **keywords)

        def on_log(self, *arguments, **keywords):
            self.bar.on_log(*arguments, **keywords)

    with pytest.raises(KeyboardInterrupt):
        training.train(adapted(), tokenizer, steps=8, progress=Both(training.progress_bar()))
    ((box, _),) = shown
    bar, words = box.children
    assert (bar.value, bar.max) == (3, 8)
    assert re.fullmatch(r"step 3 of 8, loss \d+(\.\d+)?", words.value)


# What is on the disk.


def below(folder):
    """Every path below a folder, as text."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model):
    with torch.inference_mode():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_saved_model_is_the_model(tokenizer, tmp_path):
    model = adapted("bf16", "sdpa")
    training.train(model, tokenizer)
    merged = model.merge_and_unload()
    folder = training.save(merged, tmp_path / "deep" / "merged", tokenizer)
    assert folder == (tmp_path / "deep" / "merged").resolve()
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert torch.equal(logits(reloaded(folder)), logits(merged))
    assert ask(reloaded(folder), AutoTokenizer.from_pretrained(folder)) == ANSWER


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_is_off_in_the_training_only(tokenizer, tmp_path, use_cache):
    class Cache(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            seen.append(model.config.use_cache)

    seen = []
    model = load("bf16", "sdpa")
    model.config.use_cache = use_cache
    training.train(model, tokenizer, steps=1, progress=Cache())
    assert seen == [use_cache and not FIVE]  # Transformers 4 leaves it alone
    assert model.config.use_cache is use_cache
    assert reloaded(training.save(model, tmp_path / "model")).config.use_cache is use_cache


def test_a_saved_adapter_is_the_adapter(tokenizer, tmp_path, monkeypatch):
    model = adapted("bf16", "sdpa")
    training.train(model, tokenizer)
    monkeypatch.chdir(tmp_path)
    folder = training.save(model, "adapter")
    assert folder == (tmp_path / "adapter").resolve()
    assert below(tmp_path) == [
        "adapter",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(load("bf16", "sdpa"), folder)
    assert torch.equal(logits(again), logits(model))


def test_a_loaded_adapter_is_frozen_and_the_way_out_is_named(tokenizer, tmp_path):
    folder = training.save(adapted(), tmp_path / "adapter")
    with pytest.raises(PlanError, match="loaded without is_trainable=True"):
        training.train(PeftModel.from_pretrained(load(), folder), tokenizer)
    again = PeftModel.from_pretrained(load(), folder, is_trainable=True)
    training.train(again, tokenizer)
    assert ask(again, tokenizer) == ANSWER


def test_an_older_checkpoint_is_replaced_as_a_whole(tokenizer, tmp_path):
    folder = tmp_path / "model"
    training.save(load("fp16", "sdpa"), folder, tokenizer)
    (folder / "model-00001-of-00002.safetensors").touch()  # of a larger one
    new = load("bf16", "sdpa")
    training.save(new, folder)
    assert below(tmp_path) == [
        "model",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
    ]
    assert torch.equal(logits(reloaded(folder)), logits(new))


def test_an_empty_folder_is_taken(tmp_path):
    training.save(load("bf16", "sdpa"), tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(load("bf16", "sdpa")))


class Breaking:
    """A model whose files are all on the disk when it breaks."""

    def __init__(self, error, model=None):
        self.error = error
        self.model = model or load("bf16", "sdpa")

    def save_pretrained(self, folder):
        self.model.save_pretrained(folder)
        assert (Path(folder) / "model.safetensors").is_file()
        raise self.error


ERRORS = {
    KeyboardInterrupt(): KeyboardInterrupt,
    MemoryError(): MemoryError,
    OSError(28, "No space left on device"): CheckpointError,
    SafetensorError("I/O error: No space left on device (os error 28)"): CheckpointError,
    Exception("No space left on device (os error 28)"): CheckpointError,  # of tokenizers
    ValueError("not of the disk"): ValueError,
}


@pytest.mark.parametrize("older", [False, True], ids=["new", "older one"])
@pytest.mark.parametrize(("error", "expected"), ERRORS.items(), ids=repr)
def test_a_save_that_breaks_leaves_nothing_under_the_final_name(tmp_path, error, expected, older):
    folder = tmp_path / "model"
    old = load("fp16", "sdpa")
    if older:
        training.save(old, folder)
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in below(tmp_path)}
    with pytest.raises(expected) as caught:
        training.save(Breaking(error), folder)
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in before} == before
    assert below(tmp_path) == list(before)
    if older:
        assert torch.equal(logits(reloaded(folder)), logits(old))
    if expected is CheckpointError:
        assert re.fullmatch(
            rf"The checkpoint cannot be written to {re.escape(repr(str(folder)))} \(.*No space"
            r" left on device.*\): free some space, or give a folder that can be written\.",
            str(caught.value),
        )
        assert caught.value.__cause__ is error


@pytest.mark.parametrize(("name", "stays"), [("model", "older"), ("new", "newer")])
def test_ctrl_c_right_after_a_rename_loses_nothing_and_is_not_swallowed(
    tmp_path, monkeypatch, name, stays
):
    folder = tmp_path / "model"
    models = {"older": load("fp16", "sdpa"), "newer": load("bf16", "sdpa")}
    training.save(models["older"], folder)
    real = Path.rename

    def rename(self, target):
        real(self, target)
        if self.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        training.save(models["newer"], folder)
    assert torch.equal(logits(reloaded(folder)), logits(models[stays]))
    assert {path.split("/")[0] for path in below(tmp_path)} == {"model"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(13, "in use")], ids=repr)
def test_an_older_checkpoint_that_cannot_be_put_back_is_kept_beside(tmp_path, monkeypatch, error):
    folder = tmp_path / "model"
    old = load("fp16", "sdpa")
    training.save(old, folder)
    real = Path.rename

    def rename(self, target):
        if self != folder:
            raise type(error)(*error.args, str(self), None, str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    interrupted = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if interrupted else CheckpointError) as caught:
        training.save(load("bf16", "sdpa"), folder)
    (kept,) = tmp_path.glob(".model-*/old")
    assert torch.equal(logits(reloaded(kept)), logits(old))
    assert kept.parent.name in str(caught.value)


def test_a_checkpoint_in_use_is_named_as_the_cause(tmp_path, monkeypatch):
    """As Windows refuses to rename a folder while a model has a file of it mapped."""
    folder = tmp_path / "model"
    old = load("fp16", "sdpa")
    training.save(old, folder)

    def rename(self, target):
        raise PermissionError(13, "Access is denied", str(self), 5, str(target))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="it may be in use by a model that is") as caught:
        training.save(load("bf16", "sdpa"), folder)
    assert re.fullmatch(r"[^\n]+ loaded from it, .* give [^\n]+\.", str(caught.value))
    assert "free some space" not in str(caught.value)
    assert torch.equal(logits(reloaded(folder)), logits(old))
    assert {path.split("/")[0] for path in below(tmp_path)} == {"model"}


def test_a_place_without_the_right_to_write_is_not_in_use(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(CheckpointError, match=r"denied\): give a folder that can") as caught:
        training.save(load("bf16", "sdpa"), tmp_path / "model")
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(13, "in use")])
def test_a_save_that_breaks_between_the_two_renames_puts_the_older_one_back(
    tmp_path, monkeypatch, error
):
    folder = tmp_path / "model"
    old = load("fp16", "sdpa")
    training.save(old, folder)
    real = Path.rename

    def rename(self, target):
        if self.name == "new":
            assert not folder.exists()
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    ):
        training.save(load("bf16", "sdpa"), folder)
    assert torch.equal(logits(reloaded(folder)), logits(old))
    assert {path.split("/")[0] for path in below(tmp_path)} == {"model"}


KILLED = """
import sys, time
from transformers import AutoModelForCausalLM
from helpers import checkpoints, training

class Slow:
    def save_pretrained(self, folder):
        model = AutoModelForCausalLM.from_pretrained(checkpoints.get("bf16"))
        model.save_pretrained(folder)
        print("half", flush=True)
        time.sleep(600)

training.save(Slow(), sys.argv[1])
"""


@pytest.mark.parametrize("older", [False, True], ids=["new", "older one"])
def test_a_process_that_is_killed_leaves_nothing_under_the_final_name(tmp_path, older):
    folder = tmp_path / "model"
    old = load("fp16", "sdpa")
    if older:
        training.save(old, folder)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout.readline().strip() == b"half"
    finally:
        process.kill()
        process.communicate()
    left = [path for path in below(tmp_path) if path.endswith(".safetensors")]
    assert [path for path in left if not path.startswith("model/")] != []  # it was half-way
    if older:
        assert torch.equal(logits(reloaded(folder)), logits(old))
    else:
        assert not folder.exists()
    new = load("bf16", "sdpa")
    training.save(new, folder)
    assert torch.equal(logits(reloaded(folder)), logits(new))


def test_an_interrupted_training_saves_nothing(tmp_path, tokenizer):
    """As a script does it: train, then save over the adapter of yesterday."""
    folder = tmp_path / "adapter"
    yesterday = training.save(adapted("bf16", "sdpa"), folder)
    before = (yesterday / "adapter_model.safetensors").read_bytes()
    model = adapted("bf16", "sdpa")

    def script(progress=None):
        training.train(model, tokenizer, progress=progress)
        training.save(model, folder)

    with pytest.raises(KeyboardInterrupt):
        script(CtrlC())
    assert (yesterday / "adapter_model.safetensors").read_bytes() == before
    assert {path.split("/")[0] for path in below(tmp_path)} == {"adapter"}
    script()
    assert (yesterday / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    "files",
    [
        ["notes.txt"],
        ["config.json", "model.safetensors", "thesis.docx"],
        ["adapter_config.json", "step-500.bin/optimizer.pt"],
    ],
    ids=["no checkpoint", "a file of somebody's", "a folder inside"],
)
def test_a_folder_with_other_things_is_not_replaced(tmp_path, files):
    folder = tmp_path / "outputs"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("precious", "utf-8")
    before = below(tmp_path)
    with pytest.raises(CheckpointError, match=r"something would be lost: give the name of"):
        training.save(load("bf16", "sdpa"), folder)
    assert below(tmp_path) == before
    assert all((folder / file).read_text("utf-8") == "precious" for file in files)


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "model").write_text("precious", "utf-8")
    with pytest.raises(CheckpointError, match=r"model' is there and is not one checkpoint"):
        training.save(load("bf16", "sdpa"), tmp_path / "model")
    assert (tmp_path / "model").read_text("utf-8") == "precious"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written to .*give a folder") as caught:
        training.save(load("bf16", "sdpa"), tmp_path / "file" / "model")
    assert "\n" not in str(caught.value)
    assert below(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small file system, or skips and says why there is none."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = []

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def sizes(folder):
    """The sizes of the files in whole pages, in KiB, smallest first."""
    return sorted(-(-file.stat().st_size // 4096) * 4 for file in folder.iterdir())


@pytest.mark.parametrize("place", ["nothing fits", "half fits", "the last page is missing"])
@pytest.mark.parametrize("what", ["model", "adapter"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    what, place, tokenizer, tmp_path, small_disk
):
    model = load("bf16", "sdpa") if what == "model" else adapted("bf16", "sdpa")
    needed = sum(sizes(training.save(model, tmp_path / "elsewhere", tokenizer)))
    room = {"nothing fits": 4, "half fits": needed // 8 * 4, "the last page is missing": needed - 4}
    disk = small_disk(f"size={room[place]}k")
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*free some space"
    ) as caught:
        training.save(model, disk / "x", tokenizer)
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
    assert below(disk) == []


def test_a_read_only_disk_is_one_sentence(tokenizer, small_disk):
    disk = small_disk("ro,size=64k")
    with pytest.raises(CheckpointError, match="Read-only file system") as caught:
        training.save(load("bf16", "sdpa"), disk / "x", tokenizer)
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))
