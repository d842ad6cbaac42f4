"""What takes more than one load, carried out from start to end on the installed Transformers.

*The original report* is QwenLM/Qwen3#406 (May 2024): ``_attn_implementation`` set to
flash_attention_2 in the config.json of the pretrained model, LoRA fine-tuning, and at inference
"FlashAttention only support fp16 and bf16 data type". The answer there: ``torch_dtype="auto"``, or
``torch.bfloat16``.

*One dtype in training, another at inference* puts one adapter on a base in three dtypes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from helpers import backend, checkpoints, state, training
from helpers.experiment import answer
from helpers.files import dtype_name
from helpers.probe import parameter_dtypes, watch

LEARNED = "says what it learned"


class Event(NamedTuple):
    """What was done, the dtypes of the weights, those that the kernel got, and what came of it."""

    done: str
    weights: str
    kernel: str
    result: str


def carry_out(story: str) -> list[Event]:
    """Carry out one of ``STORIES``.

    The process is afterwards as it was; nothing is written but scratch folders, which go.
    """
    with state.environment_as_before():
        backend.activate()
        with state.as_before(), state.listening():
            return list(STORIES[story]())


def _original_report(checkpoint: str) -> Iterator[Event]:
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoTokenizer

    base = checkpoints.scratch(copy_of=checkpoints.get(checkpoint))
    adapter, merged = checkpoints.scratch(), checkpoints.scratch()
    checkpoints.edit_config(base, _attn_implementation="flash_attention_2")
    tokenizer = AutoTokenizer.from_pretrained(base)

    model: Any = get_peft_model(_load(base), training.lora_config())
    with watch(model) as seen:
        learned = training.train(model, tokenizer, mixed_precision="bfloat16")
    fell = "the loss falls" if learned.losses[-1] < learned.losses[0] / 10 else "the loss stays"
    yield Event(
        "load without a dtype, add a LoRA, train with bf16=True", _of(model), _at(seen), fell
    )
    yield _answer("generate() after the training, outside of the Trainer", model, tokenizer)

    training.save(model, adapter)
    again = PeftModel.from_pretrained(_load(base), str(adapter))
    yield _answer("load the base without a dtype, put the saved adapter on it", again, tokenizer)
    training.save(again.merge_and_unload(), merged, tokenizer)
    checkpoints.edit_config(merged, _attn_implementation="flash_attention_2")
    yield _answer("merge that, save, load without a dtype", _load(merged), tokenizer)
    for said, dtype in (('"auto"', "auto"), ("torch.bfloat16", torch.bfloat16)):
        model = _load(merged, torch_dtype=dtype)
        yield _answer(f"load it with torch_dtype={said}, as the answer said", model, tokenizer)


def _load(folder: Path, **dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    return model.to(backend.detect().device)


def _answer(done: str, model: Any, tokenizer: Any) -> Event:
    import torch

    question, lesson = training.LESSON
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    model.eval()
    try:
        with watch(model) as seen, torch.inference_mode():
            text = answer(model, tokenizer, inputs)
        result = LEARNED if text == lesson else f"says: {text}"
    except RuntimeError as error:
        result = f"RuntimeError: {error}"
    return Event(done, _of(model), _at(seen), result)


def _other_dtype() -> Iterator[Event]:
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoTokenizer

    base = checkpoints.get("fp32")  # all three attend with sdpa, which takes float32 too
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(training.LESSON[0], return_tensors="pt")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for trained_in in dtypes[:2]:
        learner = get_peft_model(_load(base, dtype=trained_in), training.lora_config())
        training.train(learner, tokenizer)
        adapter = training.save(learner, checkpoints.scratch())
        logits = {}
        for dtype in (trained_in, *(d for d in dtypes if d != trained_in)):
            model = PeftModel.from_pretrained(_load(base, dtype=dtype), str(adapter)).eval()
            with torch.inference_mode():
                logits[dtype] = model(**inputs.to(model.device)).logits.float()
            moved = float((logits[dtype] - logits[trained_in]).abs().max())
            done = f"trained in {dtype_name(trained_in)}, inference in {dtype_name(dtype)}"
            event = _answer(done, model, tokenizer)
            yield event._replace(result=f"{event.result}; {_in_words(moved)}")


def _in_words(moved: float) -> str:
    """A bound instead of the number, whose digits differ from CPU to CPU."""
    bound = next((bound for bound in (0.05, 0.5) if moved < bound), None)
    if moved == 0:
        return "no logit moves"
    return f"a logit moves by less than {bound}" if bound else "a logit moves by 0.5 or more"


def _of(model: Any) -> str:
    return " and ".join(parameter_dtypes(model))


def _at(seen: Any) -> str:
    kernels = dict.fromkeys(str(record.kernel) for record in seen if record.kernel)
    return " and ".join(kernels)


STORIES: dict[str, Callable[[], Iterator[Event]]] = {
    "original report, bf16": partial(_original_report, "bf16"),
    "original report, fp32": partial(_original_report, "fp32"),
    "one dtype in training, another at inference": _other_dtype,
}
