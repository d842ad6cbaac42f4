"""What is to be loaded, and how: a LoadPlan, and the script that a person would write for it."""

import functools
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from helpers import checkpoints, subjects
from helpers.errors import PlanError
from helpers.files import dtype_name, listed
from helpers.steps import ADD_ADAPTER, STEPS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAMES = (*checkpoints.available(), *subjects.known())
HALF = ("bfloat16", "float16")
DTYPES = ("omitted", "auto", *HALF, "float32")
DEFAULT_DTYPES = (None, *HALF, "float32")
AUTOCAST = (None, *HALF)
ATTENTION = ("flash_attention_2", "sdpa", "eager")
KEYWORDS = ("dtype", "torch_dtype")
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class LoadPlan:
    """What to load, and how.

    Attributes:
        checkpoint: a name from ``checkpoints.available()`` or ``subjects.known()``, a folder, a hub
            id, or a config. Where its weights are not on this machine, the run is one of tensors
            without data.
        dtype: the ``dtype=`` argument of ``from_pretrained``; ``"omitted"`` leaves it out.
        default_dtype: what ``torch.set_default_dtype`` is set to around the load, or None.
        attention: the ``attn_implementation=`` argument.
        autocast: the dtype of the ``torch.autocast`` region around forward and generate, or None.
        after_load: steps applied to the loaded model in this order, from ``STEPS``.
        question: what the model is asked.
        adapter: the folder of a LoRA adapter that is put on the loaded model before the steps.
        keyword: the name of the argument ``dtype``; before Transformers 4.56 it was
            ``"torch_dtype"``, which later releases still take.

    A ``torch.dtype`` may stand wherever the name of one may.
    """

    checkpoint: "str | os.PathLike[str] | PretrainedConfig" = "bf16"
    dtype: str = "omitted"
    default_dtype: str | None = None
    attention: str = "flash_attention_2"
    autocast: str | None = None
    after_load: tuple[str, ...] = ()
    question: str = checkpoints.QUESTION
    adapter: str | os.PathLike[str] | None = None
    keyword: str = "dtype"

    def __post_init__(self) -> None:
        for name in ("dtype", "default_dtype", "autocast"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, dtype_name(value))
        # from_pretrained knows no "~"; a Path would turn the slash of a hub id on Windows.
        if isinstance(self.checkpoint, (str, os.PathLike)):
            path = os.path.expanduser(self.checkpoint)  # noqa: PTH111
            object.__setattr__(self, "checkpoint", path)
        if self.adapter is not None:
            object.__setattr__(self, "adapter", os.path.expanduser(self.adapter))  # noqa: PTH111
        steps: Any = self.after_load
        object.__setattr__(self, "after_load", (steps,) if isinstance(steps, str) else tuple(steps))

    @property
    def name(self) -> str:
        """The checkpoint as a line or a table shows it."""
        given = self.checkpoint
        return str(given) if isinstance(given, (str, os.PathLike)) else type(given).__name__

    @property
    def uses_autocast(self) -> bool:
        """Whether forward passes of the plan run under autocast, those of a training included."""
        return self.autocast is not None or "train" in self.after_load

    def check(self) -> None:
        """Raise PlanError where a field has a value that ``run`` does not know."""
        for name, known in (
            ("dtype", DTYPES),
            ("default_dtype", DEFAULT_DTYPES),
            ("attention", ATTENTION),
            ("autocast", AUTOCAST),
            ("keyword", KEYWORDS),
        ):
            if (value := getattr(self, name)) not in known:
                raise PlanError(f"{name}={value!r} is not known: use one of {listed(known)}.")
        if unknown := [step for step in self.after_load if step not in STEPS]:
            raise PlanError(f"after_load has {unknown[0]!r}: use steps from {listed(STEPS)}.")
        self._check_adapters()

    def _check_adapters(self) -> None:
        has_adapter = self.adapter is not None
        for step in self.after_load:
            if step == "merge" and not has_adapter:
                raise PlanError(
                    "after_load has 'merge' with nothing to merge: put 'lora' before it, or give"
                    " adapter= a folder."
                )
            if step == "reload" and has_adapter:
                raise PlanError(
                    "after_load has 'reload' on a model with an adapter, of which save_pretrained"
                    " writes the adapter alone: put 'merge' before it."
                )
            has_adapter = step in ADD_ADAPTER or (has_adapter and step != "merge")


def snippet(plan: LoadPlan, transformers_version: str | None = None) -> str:
    """The plan as lines to paste, spelled for a Transformers version (default: the installed one).

    ``dtype=`` is the name from 4.56 on, ``torch_dtype=`` before (huggingface/transformers#39782).
    """
    own = isinstance(plan.checkpoint, (str, os.PathLike)) and plan.name not in NAMES
    path = _quoted(plan.name if own else "path/to/your-model")
    numbers = re.findall(r"\d+", transformers_version or _installed())
    release = tuple(map(int, numbers[:2]))
    keyword = plan.keyword if release >= (4, 56) else "torch_dtype"
    value = '"auto"' if plan.dtype == "auto" else f"torch.{plan.dtype}"

    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"path = {path}", "tokenizer = AutoTokenizer.from_pretrained(path)"]
    if plan.default_dtype:
        lines += ["before = torch.get_default_dtype()"]
        lines += [f"torch.set_default_dtype(torch.{plan.default_dtype})"]
    lines += ["model = AutoModelForCausalLM.from_pretrained(", "    path,"]
    if plan.dtype != "omitted":
        lines += [f"    {keyword}={value},"]
    lines += [f'    attn_implementation="{plan.attention}",', ")"]
    if plan.default_dtype:
        lines += ["torch.set_default_dtype(before)"]
    lines += ["if torch.cuda.is_available():", '    model = model.to("cuda")']
    if plan.adapter is not None:
        lines += ["from peft import PeftModel"]
        lines += [f"model = PeftModel.from_pretrained(model, {_quoted(str(plan.adapter))})"]
    lines += [
        line.replace("{dtype}", keyword).replace("{attention}", plan.attention)
        for step in plan.after_load
        for line in STEPS[step].lines
    ]
    question = _quoted(plan.question)
    lines += ["", f'inputs = tokenizer({question}, return_tensors="pt").to(model.device)']
    call = f"output = model.generate(**inputs, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)"
    if plan.autocast:
        if release < (5,) and plan.attention == "flash_attention_2":
            lines += ["# Transformers 4 sees this region on a GPU only: on a CPU float32 stays."]
        lines += [f"with torch.autocast(model.device.type, dtype=torch.{plan.autocast}):"]
        call = "    " + call
    lines += [call, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    return "\n".join(lines) + "\n"


@functools.cache  # reading the metadata of a package takes milliseconds
def _installed() -> str:
    return version("transformers")


def _quoted(text: str) -> str:
    """A Python string literal in double quotes; JSON's are a subset of Python's."""
    return json.dumps(text, ensure_ascii=False)
