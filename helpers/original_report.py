"""The report that this guide began with, from start to end, on the installed Transformers.

QwenLM/Qwen3#406 (May 2024): ``_attn_implementation`` set to flash_attention_2 in the config.json of
the pretrained model, LoRA fine-tuning, and at inference "FlashAttention only support fp16 and bf16
data type". The answer there: ``torch_dtype="auto"``, or ``torch.bfloat16``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helpers import backend, checkpoints, state, training
from helpers.experiment import parameter_dtypes
from helpers.gate import watch


class Event(NamedTuple):
    """What was done, the dtypes of the weights, those that the kernel got, and what came of it."""

    done: str
    weights: str
    kernel: str
    result: str


def reproduce(checkpoint: str) -> list[Event]:
    """Carry it out with one of the guide's checkpoints as the pretrained model.

    The process is afterwards as it was; nothing is written but scratch folders, which go.
    """
    with state.as_before(), state.listening():
        backend.activate()
        return list(_events(checkpoint))


def _events(checkpoint: str) -> Iterator[Event]:
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

    question, answer = training.LESSON
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    model.eval()
    result = ""
    try:
        with watch(model) as seen, torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        result = "says what it learned" if text.strip() == answer else f"says: {text.strip()}"
    except RuntimeError as error:
        result = f"RuntimeError: {error}"
    return Event(done, _of(model), _at(seen), result)


def _of(model: Any) -> str:
    return " and ".join(parameter_dtypes(model))


def _at(seen: Any) -> str:
    return " and ".join(dict.fromkeys(str(record.kernel) for record in seen))
