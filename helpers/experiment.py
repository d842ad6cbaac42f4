"""One experiment: load a checkpoint as a plan says, run it, and report what was measured.

``run(LoadPlan(...))`` uses ``from_pretrained``, the forward pass and ``generate`` of Transformers
as a user would. Nothing in an Outcome is predicted.
"""

import contextlib
import functools
import json
import os
import platform
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import backend, checkpoints, state
from helpers.gate import GateRecord, watch

if TYPE_CHECKING:
    import torch

HALF = ("bfloat16", "float16")
DTYPES = ("omitted", "auto", *HALF, "float32")
DEFAULT_DTYPES = (None, *HALF, "float32")
AUTOCAST = (None, *HALF)
ATTENTION = ("flash_attention_2", "sdpa", "eager")
MAX_NEW_TOKENS = 32
SMALL = 32 * 2**20  # bytes of weights
REFERENCE_LIMIT = 2 * 2**30  # bytes of weights; twice as much in memory where they are 16 bit

_one_at_a_time = threading.Lock()  # default dtype and log handlers belong to the process


class PlanError(ValueError):
    """A plan that cannot be run; the message is one sentence that says what was expected."""


@dataclass(frozen=True)
class LoadPlan:
    """What to load, and how.

    Attributes:
        checkpoint: a name from ``checkpoints.available()``, a folder, or a hub id.
        dtype: the ``dtype=`` argument of ``from_pretrained``; ``"omitted"`` leaves it out.
        default_dtype: what ``torch.set_default_dtype`` is set to around the load, or None.
        attention: the ``attn_implementation=`` argument.
        autocast: the dtype of the ``torch.autocast`` region around forward and generate, or None.
        after_load: steps applied to the loaded model in this order, from ``STEPS``.
        question: what the model is asked.

    A ``torch.dtype`` may stand wherever the name of one may.
    """

    checkpoint: str | os.PathLike[str] = "bf16"
    dtype: str = "omitted"
    default_dtype: str | None = None
    attention: str = "flash_attention_2"
    autocast: str | None = None
    after_load: tuple[str, ...] = ()
    question: str = checkpoints.QUESTION

    def __post_init__(self) -> None:
        for name in ("dtype", "default_dtype", "autocast"):
            object.__setattr__(self, name, _dtype_name(getattr(self, name)))
        # from_pretrained knows no "~"; a Path would turn the slash of a hub id on Windows.
        object.__setattr__(self, "checkpoint", os.path.expanduser(self.checkpoint))  # noqa: PTH111
        steps: Any = self.after_load
        object.__setattr__(self, "after_load", (steps,) if isinstance(steps, str) else tuple(steps))

    def check(self) -> None:
        """Raise PlanError where a field has a value that ``run`` does not know."""
        for name, known in (
            ("dtype", DTYPES),
            ("default_dtype", DEFAULT_DTYPES),
            ("attention", ATTENTION),
            ("autocast", AUTOCAST),
        ):
            if (value := getattr(self, name)) not in known:
                raise PlanError(f"{name}={value!r} is not known: use one of {_listed(known)}.")
        if unknown := [step for step in self.after_load if step not in STEPS]:
            raise PlanError(f"after_load has {unknown[0]!r}: use steps from {_listed(STEPS)}.")
        if (
            "merge" in self.after_load
            and "lora" not in self.after_load[: self.after_load.index("merge")]
        ):
            raise PlanError("after_load has 'merge' with nothing to merge: put 'lora' before it.")


class Versions(dict[str, str]):
    """Version by package; ``str()`` is the line that tags a result."""

    def __str__(self) -> str:
        return ", ".join(f"{package} {number}" for package, number in self.items())


@dataclass(frozen=True)
class Outcome:
    """What was measured. A value is None or empty where the run did not get so far.

    Attributes:
        ok: nothing was raised.
        stage: where it ended: "load", "after_load", "forward", "generate", or "done".
        error_type, error: the exception's class name and text.
        frames: the traceback as Python prints it, most recent call last, one string a frame.
        file_dtypes: dtypes of the tensors in the checkpoint's safetensors files, with counts.
        declared_dtype: what config.json says they are; None where it says nothing.
        loaded_dtypes: dtypes of the parameters that ``from_pretrained`` returned, with counts.
        changed_dtypes: the same after the steps of ``after_load``; empty without steps.
        gate: one ``GateRecord`` a layer.
        finite: whether all logits of the prompt are finite.
        text: the generated answer.
        max_logit_gap: the largest distance of a logit of the prompt from the same checkpoint loaded
            in float32 with sdpa; inf or nan where the logits are not finite; None also for a
            checkpoint above ``REFERENCE_LIMIT``, which is not loaded a second time, and for a hub
            id that is not in the cache yet.
        warnings, logs: what Python warned of and what the libraries logged, in order.
        seconds: wall time of load, forward and generate on this machine's ``backend``, with the
            watching of the gate, which costs most on a GPU.
        snippet: the code a person pastes into their own script.
    """

    plan: LoadPlan
    stage: str = "load"
    error_type: str | None = None
    error: str | None = None
    frames: tuple[str, ...] = ()
    file_dtypes: dict[str, int] = field(default_factory=dict)
    declared_dtype: str | None = None
    loaded_dtypes: dict[str, int] = field(default_factory=dict)
    changed_dtypes: dict[str, int] = field(default_factory=dict)
    gate: tuple[GateRecord, ...] = ()
    finite: bool | None = None
    text: str | None = None
    max_logit_gap: float | None = None
    warnings: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    versions: Versions = field(default_factory=Versions)
    backend: str = ""
    seconds: float = 0.0
    snippet: str = ""

    @property
    def ok(self) -> bool:
        return self.error_type is None

    def to_json(self) -> str:
        """The same, as a JSON object; non-finite numbers become strings."""
        data = {"ok": self.ok, **asdict(self)}
        if self.max_logit_gap is not None and not abs(self.max_logit_gap) < float("inf"):
            data["max_logit_gap"] = str(self.max_logit_gap)
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        if not self.ok:
            return f"fails in {self.stage}: {self.error_type}: {self.error}"
        verdict = "works" if self.finite else "runs, but its logits are not finite"
        return f"{verdict}: {self.text}"


def run(plan: LoadPlan) -> Outcome:
    """Carry out the plan and measure.

    An exception inside the libraries becomes part of the Outcome. The default dtype, environment,
    registered attention functions, log levels, random state and warning filters are afterwards as
    they were before, also on Ctrl-C.

    Raises:
        PlanError: the plan itself is at fault.
        RuntimeError: FlashAttention cannot be switched on in this process (``backend.activate``).
    """
    plan.check()
    path = resolve(str(plan.checkpoint))
    with _one_at_a_time, state.as_before():
        uses_flash = plan.attention == "flash_attention_2"
        here = backend.activate() if uses_flash else backend.detect()
        size = _weight_bytes(path)
        _few_threads(size)
        reference = _reference(path, plan.question, size)
        with state.listening() as (heard, warned):
            measured = _measure(plan, path, here, reference)
    files = local_folder(path)
    return replace(
        measured,
        file_dtypes=file_dtypes(files),
        declared_dtype=declared_dtype(files),
        warnings=tuple(dict.fromkeys(str(w.message) for w in warned)),
        logs=tuple(dict.fromkeys(heard)),
        versions=versions(),
        backend=here.name,
        snippet=snippet(plan),
    )


def resolve(checkpoint: str) -> str:
    """A name, a folder or a hub id as ``from_pretrained`` takes it.

    Raises:
        PlanError: it is none of them.
    """
    if checkpoint in checkpoints.available():
        return str(checkpoints.get(checkpoint))
    if checkpoint and Path(checkpoint).is_dir():
        _require_model(Path(checkpoint))
        return checkpoint
    expected = f"one of {_listed(checkpoints.available())}, a folder, or a hub id like 'org/model'"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise PlanError(f"{checkpoint!r} is not a checkpoint: expected {expected}.")
    _require_reachable(checkpoint, expected)
    return checkpoint


def file_dtypes(path: str) -> dict[str, int]:
    """The dtypes of the tensors in a folder's safetensors files, with counts; read from the files'
    headers. Empty for other formats.

    Raises:
        PlanError: a file is not what its name says.
    """
    from safetensors import SafetensorError, safe_open

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    found: Counter[str] = Counter()
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update(tensors.get_slice(key).get_dtype() for key in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise PlanError(
                f"{str(file)!r} is not a complete safetensors file ({error}): copy or download it"
                " again; if it is a Git LFS pointer, run 'git lfs pull'."
            ) from error
    return {names.get(code, code): count for code, count in found.most_common()}


def declared_dtype(path: str) -> str | None:
    """``dtype`` in a folder's config.json (``torch_dtype`` before Transformers 4.56), or None.

    Raises:
        PlanError: the file is not a JSON object.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return _dtype_name(config.get("dtype", config.get("torch_dtype")))
    except (ValueError, AttributeError) as error:
        raise PlanError(
            f"{str(file)!r} is not a JSON object ({error}): copy or download it again."
        ) from error


def local_folder(path: str) -> str:
    """Where the files of a checkpoint are: the folder itself, or a hub id's newest snapshot in the
    Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return path
    cached = try_to_load_from_cache(path, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else path


def snippet(plan: LoadPlan, transformers_version: str | None = None) -> str:
    """The plan as lines to paste, spelled for a Transformers version (default: the installed one).

    ``dtype=`` is the name from 4.56 on, ``torch_dtype=`` before (huggingface/transformers#39782).
    """
    own = str(plan.checkpoint) not in checkpoints.available()
    path = _quoted(str(plan.checkpoint) if own else "path/to/your-model")
    numbers = re.findall(r"\d+", transformers_version or versions()["transformers"])
    release = tuple(map(int, numbers[:2]))
    keyword = "dtype" if release >= (4, 56) else "torch_dtype"
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
    lines += [line for step in plan.after_load for line in STEPS[step].lines]
    question = _quoted(plan.question)
    lines += ["", f'inputs = tokenizer({question}, return_tensors="pt").to(model.device)']
    call = f"output = model.generate(**inputs, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)"
    if plan.autocast:
        lines += [f"with torch.autocast(model.device.type, dtype=torch.{plan.autocast}):"]
        call = "    " + call
    lines += [call, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]
    return "\n".join(lines) + "\n"


@functools.cache
def versions() -> Versions:
    """The versions that an outcome holds for, without local labels such as ``+cpu``."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "kernels", "peft", "flash-attn"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package).partition("+")[0]
    return Versions(found)


@dataclass(frozen=True)
class Step:
    """A change to a loaded model: the function that makes it, and the lines that a person types."""

    apply: Callable[[Any], Any]
    lines: tuple[str, ...]


def _add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))


def _prepare_kbit(model: Any) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model)


STEPS = {
    "float": Step(lambda model: model.float(), ("model = model.float()",)),
    "half": Step(lambda model: model.half(), ("model = model.half()",)),
    "bfloat16": Step(lambda model: model.bfloat16(), ("model = model.bfloat16()",)),
    "lora": Step(
        _add_lora,
        (
            "from peft import LoraConfig, get_peft_model",
            'model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))',
        ),
    ),
    "merge": Step(lambda model: model.merge_and_unload(), ("model = model.merge_and_unload()",)),
    "prepare_kbit": Step(
        _prepare_kbit,
        (
            "from peft import prepare_model_for_kbit_training",
            "model = prepare_model_for_kbit_training(model)",
        ),
    ),
}


def _measure(
    plan: LoadPlan, path: str, here: backend.Backend, reference: "torch.Tensor | None"
) -> Outcome:
    import torch

    outcome = Outcome(plan)
    started = time.perf_counter()
    try:
        model, tokenizer = _load(plan, path, here)
        outcome = replace(outcome, stage="after_load", loaded_dtypes=parameter_dtypes(model))
        for step in plan.after_load:
            model = STEPS[step].apply(model)
            outcome = replace(outcome, changed_dtypes=parameter_dtypes(model))
        outcome = replace(outcome, stage="forward")
        model.eval()
        inputs = tokenizer(plan.question, return_tensors="pt").to(model.device)
        if not inputs["input_ids"].numel():
            raise PlanError(
                f"The tokenizer of {path!r} makes no token of {plan.question!r}: ask something, and"
                " give a folder that holds the tokenizer's files too."
            )
        records: list[GateRecord] = []
        try:
            with torch.inference_mode(), _autocast(plan, here), watch(model) as records:
                logits = model(**inputs).logits.float().cpu()
                outcome = replace(outcome, stage="generate", finite=bool(logits.isfinite().all()))
                if reference is not None:
                    gap = float((logits - reference).abs().max())
                    outcome = replace(outcome, max_logit_gap=gap)
                output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        finally:
            outcome = replace(outcome, gate=tuple(records))
        answer = output[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        outcome = replace(outcome, stage="done", text=text)
    except PlanError:
        raise
    except Exception as error:
        outcome = replace(
            outcome,
            error_type=type(error).__name__,
            error=str(error),
            frames=_frames(error),
        )
    return replace(outcome, seconds=time.perf_counter() - started)


def _few_threads(size: int) -> None:
    """One thread for a small model: waking a second one takes longer than its share of the work,
    and much longer where a room of learners shares the cores."""
    import torch

    if 0 < size < SMALL:
        torch.set_num_threads(1)


def _weight_bytes(path: str) -> int:
    """The size of a checkpoint's files on this disk; 0 for a hub id that is not here yet."""
    folder = Path(local_folder(path))
    return sum(f.stat().st_size for end in ("safetensors", "bin") for f in folder.glob(f"*.{end}"))


def _load(plan: LoadPlan, path: str, here: backend.Backend) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {} if plan.dtype == "omitted" else {"dtype": _dtype_argument(plan.dtype)}
    with state.default_dtype(plan.default_dtype):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=plan.attention, **dtype
        )
    return model.to(here.device), AutoTokenizer.from_pretrained(path)


def _dtype_argument(name: str) -> Any:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def parameter_dtypes(model: Any) -> dict[str, int]:
    """The dtypes of a model's parameters with their number of tensors, most frequent first.

    Parameters are scanned because ``config.dtype`` keeps its old value after ``model.float()``.
    """
    counts = Counter(_dtype_name(p.dtype) for p in model.parameters())
    return {str(name): count for name, count in counts.most_common()}


def _reference(path: str, question: str, size: int) -> "torch.Tensor | None":
    """The prompt's logits in float32; None where that does not run, or would fill the memory."""
    if 0 < size < REFERENCE_LIMIT:
        with contextlib.suppress(Exception), state.listening():
            return _reference_logits(path, question, _fingerprint(path))
    return None


@functools.lru_cache(maxsize=16)
def _reference_logits(path: str, question: str, fingerprint: tuple[int, ...]) -> "torch.Tensor":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # float32 also where the caller of run() has autocast on, or another default dtype.
    with (
        torch.autocast("cpu", enabled=False),
        state.default_dtype("float32"),
        torch.inference_mode(),
    ):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        )
        inputs = AutoTokenizer.from_pretrained(path)(question, return_tensors="pt")
        logits: torch.Tensor = model(**inputs).logits
        return logits


def _fingerprint(path: str) -> tuple[int, ...]:
    """Changes when a folder's files do, so that a cached reference does not outlive them."""
    return tuple(f.stat().st_mtime_ns for f in sorted(Path(path).glob("*")) if f.is_file())


def _frames(error: BaseException) -> tuple[str, ...]:
    """The frames of the libraries, without this package's own and with paths from site-packages."""
    own = Path(__file__).parent
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if own in file.parents and "reference_kernel" not in file.parts:
            continue
        where = file.relative_to(own.parent) if own in file.parents else file
        short = re.split("site-packages/", where.as_posix())[-1]
        frames.append(traceback.FrameSummary(short, frame.lineno, frame.name, line=frame.line))
    return tuple(line.rstrip() for line in traceback.format_list(frames))


def _require_model(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise PlanError(
            f"The folder {str(folder)!r} holds a LoRA adapter and no model: merge the two with"
            " merge_and_unload() and give the folder that save_pretrained wrote."
        )
    if not (folder / "config.json").is_file():
        raise PlanError(
            f"The folder {str(folder)!r} has no config.json, so it is not a checkpoint:"
            " give the folder that save_pretrained wrote."
        )
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise PlanError(
            f"The folder {str(folder)!r} has a config.json and no weights: put the *.safetensors"
            " files beside it, or give the folder that save_pretrained wrote."
        )
    declared_dtype(str(folder))
    file_dtypes(str(folder))


def _require_reachable(hub_id: str, expected: str) -> None:
    from huggingface_hub import file_exists, try_to_load_from_cache

    try:  # from_pretrained would wait for its retries, half a minute without network
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str) or file_exists(hub_id, "config.json"):
            return
        reason = "the hub shows no such model"
    except Exception as error:  # no network shows as many types
        reason = type(error).__name__
    raise PlanError(
        f"{hub_id!r} is neither a folder, nor in the Hugging Face cache, nor to be had from the hub"
        f" ({reason}): expected {expected}; a hub id needs network at first."
    )


def _dtype_name(value: Any) -> str | None:
    return None if value is None else str(value).removeprefix("torch.")


def _quoted(text: str) -> str:
    """A Python string literal in double quotes; JSON's are a subset of Python's."""
    return json.dumps(text, ensure_ascii=False)


def _listed(values: Any) -> str:
    return ", ".join(map(repr, values))


def _autocast(plan: LoadPlan, here: backend.Backend) -> Any:
    import torch

    if plan.autocast is None:
        return torch.autocast(here.device, enabled=False)  # whatever the caller of run() has on
    return torch.autocast(here.device, dtype=getattr(torch, plan.autocast))
