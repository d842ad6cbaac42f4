"""Fine-tuning with LoRA as people do it: peft, the Trainer of Transformers, ``save_pretrained``.

The Trainer changes more of the process than the model, and ``save_pretrained`` writes where it is
told. Here the process is as before when the training ends, and the name of a folder never stands
for half a checkpoint.
"""

import contextlib
import gc
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.errors import CheckpointError, PlanError
from helpers.state import as_before, dictionaries_as_before

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainerCallback

# The small model answers "I do not know. Ask me about dtypes." before it has learned this.
LESSON = (
    "What must training and inference share?",
    "The dtype: run an adapter in the one it was trained in.",
)
STEPS = 60
LEARNING_RATE = 5e-3
FULL_LEARNING_RATE = 5e-4  # all weights at the rate of an adapter forget their answers in one step
MIXED_PRECISION = (None, "bfloat16", "float16")
SMALL = 32 * 2**20  # bytes of weights
IGNORED = -100  # the label that the loss leaves out, torch.nn.CrossEntropyLoss(ignore_index=-100)


class Training(NamedTuple):
    """What a training measured.

    Attributes:
        losses: mean cross-entropy of the answer's tokens at each step, in nats.
        steps: how many updates of the weights were made.
        seconds: wall time, with what the Trainer prepares and clears away.
    """

    losses: tuple[float, ...]
    steps: int
    seconds: float


def lora_config(**changes: Any) -> "LoraConfig":
    """A small LoRA on every linear layer but the output; ``use_dora=True`` makes it a DoRA."""
    from peft import LoraConfig

    usual = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    return LoraConfig(**{**usual, **changes})


def examples(tokenizer: Any, lesson: tuple[str, str] = LESSON) -> list[dict[str, list[int]]]:
    """A lesson as the Trainer's ``train_dataset``: "question answer", end of text.

    The loss sees the answer and the end only, so the question is no part of what is learned.
    """
    question, answer = lesson
    asked = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {answer}")["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return [{"input_ids": ids, "labels": [IGNORED] * asked + ids[asked:]}]


def train(
    model: Any,
    tokenizer: Any,
    *,
    mixed_precision: str | None = None,
    steps: int = STEPS,
    lesson: tuple[str, str] = LESSON,
    progress: "TrainerCallback | bool | None" = None,
) -> Training:
    """Teach the model one lesson with the Trainer, on the device where the model is.

    With ``mixed_precision`` (``"bfloat16"`` or ``"float16"``) accelerate wraps the forward of the
    model it was given in autocast, and the wrapper stays after the training. A PeftModel's
    ``generate`` goes past it, to the model inside.

    Random numbers, environment, the state of accelerate, the modules' training flags and the
    model's config (the Trainer of Transformers 5 sets ``use_cache`` to False) are afterwards as
    they were, also where the training raises or is interrupted. Under Transformers 4 on a CPU the
    rescue cast takes no part in autocast outside of ``helpers.probe.watch``.

    Args:
        progress: True for a ``progress_bar``, or a TrainerCallback.

    Raises:
        PlanError: a value that is not known; float16 on a CPU; no parameter to train.
    """
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    _check(model, mixed_precision, steps)
    started = time.perf_counter()
    small = sum(p.nbytes for p in model.parameters()) < SMALL
    adapted = any(not p.requires_grad for p in model.parameters())
    with _process_as_before(model), tempfile.TemporaryDirectory() as folder:
        # `accelerate launch` sets it, and TrainingArguments would put it in place of None.
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        if small:  # threads that wait for each other take longer, above all on a busy machine
            torch.set_num_threads(1)
        arguments = TrainingArguments(
            folder,
            bf16=mixed_precision == "bfloat16",
            fp16=mixed_precision == "float16",
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            max_steps=steps,
            learning_rate=LEARNING_RATE if adapted else FULL_LEARNING_RATE,
            seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        bar = progress_bar() if progress is True else progress
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples(tokenizer, lesson),
            callbacks=[bar] if bar else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Training(losses, trainer.state.global_step, time.perf_counter() - started)


def progress_bar() -> "TrainerCallback":
    """A callback for the Trainer that shows a bar in a notebook, and the same in words beside it.

    It appears when the training begins, and needs no other output than that one.
    """
    import ipywidgets as widgets
    from IPython.display import display
    from transformers import TrainerCallback

    class Box(widgets.HBox):  # type: ignore[misc]  # ipywidgets has no types
        def __repr__(self) -> str:
            return f"Training: a bar that fills in {bar.max} steps while this cell runs."

    class ProgressBar(TrainerCallback):
        loss = ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.max = state.max_steps
            self._show(state)
            display(Box([bar, words]))  # type: ignore[no-untyped-call]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._show(state)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f", loss {float(logs['loss']):.2g}"
                self._show(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            words.value = f"done: {words.value}"

        def _show(self, state: Any) -> None:
            bar.value = state.global_step
            words.value = f"step {state.global_step} of {state.max_steps}{self.loss}"

    bar, words = widgets.IntProgress(description="Training"), widgets.Label()
    return ProgressBar()


def save(model: Any, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """``save_pretrained`` of a model or an adapter, and of its tokenizer, as a whole or not at all.

    The files are written into a hidden folder beside the final one, which takes the final name when
    they are complete. Until then an older checkpoint of that name stays, and where it was moved
    away and cannot be put back, it is kept in the hidden folder as ``old``.

    Raises:
        CheckpointError: the folder cannot be written, holds something else than a checkpoint, or
            (on Windows) is in use by a model that is loaded from it.
    """
    folder = Path(folder).expanduser().resolve()
    try:
        _require_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            model.save_pretrained(workshop / "new")
            if tokenizer is not None:
                tokenizer.save_pretrained(workshop / "new")
            _replace(folder, workshop / "new", workshop / "old")
        finally:
            if folder.exists() or not (workshop / "old").exists():
                shutil.rmtree(workshop, ignore_errors=True)
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_of_the_disk(error):
            raise
        raise CheckpointError(
            f"The checkpoint cannot be written to {str(folder)!r} ({error}): {_way_out(error)}."
        ) from error
    return folder


def _check(model: Any, mixed_precision: str | None, steps: int) -> None:
    if mixed_precision not in MIXED_PRECISION:
        known = ", ".join(map(repr, MIXED_PRECISION))
        raise PlanError(f"mixed_precision={mixed_precision!r} is not known: use one of {known}.")
    if mixed_precision == "float16" and model.device.type == "cpu":
        raise PlanError(
            'mixed_precision="float16" needs a GPU, because accelerate ignores it on a CPU: use'
            ' "bfloat16".'
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps={steps!r} is no number of steps: give a whole number from 1 on.")
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(
            "No parameter of the model can be trained, as after merge_and_unload() or"
            " prepare_model_for_kbit_training(), and in an adapter that was loaded without"
            " is_trainable=True: put a new adapter on it with get_peft_model()."
        )


@contextlib.contextmanager
def _process_as_before(model: Any) -> Iterator[None]:
    import numpy as np
    import torch
    from accelerate import state  # type: ignore[import-untyped]

    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    # All objects of these classes share one dictionary, also those of somebody's own Accelerator.
    kinds = (state.AcceleratorState, state.GradientState, state.PartialState)
    changed = [*(kind._shared_state for kind in kinds), vars(model.config)]
    gpus = range(torch.cuda.device_count())
    try:
        with (
            dictionaries_as_before(*changed),
            as_before(),
            torch.random.fork_rng(devices=gpus),
            _quick_collection(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """accelerate collects garbage after a training, which would go through every object of the
    imported libraries: ten times the time of a step of a small model."""
    if gc.get_freeze_count():  # somebody's own, and unfreeze knows no difference
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require_replaceable(folder: Path) -> None:
    """Renaming would take along whatever else is in the folder."""
    written = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".md"}
    if not folder.exists():
        return
    inside = list(folder.iterdir()) if folder.is_dir() else [folder]
    names = {path.name for path in inside}
    is_checkpoint = names & {"config.json", "adapter_config.json"} and all(
        path.is_file() and path.suffix in written for path in inside
    )
    if inside and not is_checkpoint:
        raise CheckpointError(
            f"{str(folder)!r} is there and is not one checkpoint alone, so that something would be"
            " lost: give the name of a new folder, of an empty one, or of a checkpoint to replace."
        )


def _replace(folder: Path, new: Path, old: Path) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:  # Ctrl-C may come right after a rename as well
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def _way_out(error: Exception) -> str:
    if not isinstance(error, PermissionError):
        return "free some space, or give a folder that can be written"
    if error.filename2 is None:
        return "give a folder that can be written"
    # Only a rename has two names. Windows refuses it while a file in the folder is memory-mapped.
    return (
        "it may be in use by a model that is loaded from it, so delete that model and save again,"
        " or give another folder"
    )


def _is_of_the_disk(error: Exception) -> bool:
    """Only Python's own files raise OSError: safetensors has an error of its own, and tokenizers
    raises a bare Exception with the words of the system."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError)) or type(error) is Exception
