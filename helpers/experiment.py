"""One experiment: load a checkpoint as a plan says, run it, and report what was measured.

``run(LoadPlan(...))`` uses ``from_pretrained``, the forward pass and ``generate`` of Transformers
as a user would. Nothing in an Outcome is predicted.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import adapter, backend, checkpoints, state, subjects
from helpers.backend import Versions, versions
from helpers.errors import PlanError
from helpers.files import declared_dtype, file_dtypes, local_folder
from helpers.gate import How, Trace, of_config, traced
from helpers.plan import MAX_NEW_TOKENS, LoadPlan, snippet
from helpers.probe import GateRecord, parameter_dtypes, watch
from helpers.steps import NEED_WEIGHTS, STEPS, Context
from helpers.subjects import Subject

if TYPE_CHECKING:
    import torch

    from helpers.reading import XRay

SMALL = 32 * 2**20  # bytes of weights
REFERENCE_LIMIT = 2 * 2**30  # bytes of weights; twice as much in memory where they are 16 bit

Loader = Callable[[LoadPlan, str, str], tuple[Any, Any]]


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
        training_gate: one ``GateRecord`` a layer, of the step ``train``.
        gate: one ``GateRecord`` a layer, of ``generate`` if it got as far as the attention, else of
            the forward pass.
        finite: whether all logits of the prompt are finite.
        text: the generated answer.
        max_logit_gap: the largest distance of a logit of the prompt from the same checkpoint, with
            the plan's adapter, loaded in float32 with sdpa; after the step ``train`` it holds also
            what was learned; inf or nan where the logits are not finite; None also for a checkpoint
            above ``REFERENCE_LIMIT``, which is not loaded a second time, and for a hub
            id that is not in the cache yet.
        warnings, logs: what Python warned of and what the libraries logged, in order.
        seconds: wall time of load, forward and generate on this machine's ``backend``, with the
            watching of the gate, which costs most on a GPU.
        snippet: the code a person pastes into their own script.
        autocast_as_on_a_gpu: it ran on a CPU under Transformers 4, which does not see that autocast
            is on there; it was made to count as on a GPU (``probe.watch``).
        xray: of the forward pass; None where it was not reached.
        recorded: not measured now, but read from the record of another environment, which holds no
            frames, no ``max_logit_gap``, no ``seconds`` and no ``xray``.
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
    training_gate: tuple[GateRecord, ...] = ()
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
    autocast_as_on_a_gpu: bool = False
    xray: "XRay | None" = field(default=None, repr=False)
    recorded: bool = False

    @property
    def ok(self) -> bool:
        return self.error_type is None

    @property
    def weightless(self) -> bool:
        """It ran at full size on tensors that have no data, because the weights are absent."""
        return self.xray is not None and self.xray.weightless

    def to_json(self) -> str:
        """The same, as a JSON object; non-finite numbers become strings."""
        plan = replace(self.plan, checkpoint=self.plan.name)
        data = {"ok": self.ok, **asdict(replace(self, plan=plan, xray=None))}
        data["xray"] = self.xray and json.loads(self.xray.to_json())
        if self.max_logit_gap is not None and not abs(self.max_logit_gap) < float("inf"):
            data["max_logit_gap"] = str(self.max_logit_gap)
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        if not self.ok:
            return f"fails in {self.stage}: {self.error_type}: {self.error}"
        if self.xray is not None and self.weightless:
            return f"passes without weights: {self.xray.verdict.removeprefix('passes: ')}"
        verdict = "works" if self.finite else "runs, but its logits are not finite"
        return f"{verdict}: {self.text}"


def load(plan: LoadPlan, path: str, device: str) -> tuple[Any, Any]:
    """The model of a plan, by ``from_pretrained`` from ``path``, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {} if plan.dtype == "omitted" else {plan.keyword: _dtype_argument(plan.dtype)}
    with state.default_dtype(plan.default_dtype):
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=plan.attention, **dtype
        )
    return model.to(device), AutoTokenizer.from_pretrained(path)


def run(plan: LoadPlan, load: Loader = load, look: bool = True) -> Outcome:
    """Carry out the plan and measure.

    An exception inside the libraries becomes part of the Outcome. On a CPU under Transformers 4,
    autocast counts for the rescue cast as it does on a GPU (``probe.watch`` says how). The default
    dtype, environment, registered attention functions, log levels, random state and warning filters
    are afterwards as they were before, also on Ctrl-C.

    Args:
        load: what loads the model and the tokenizer; tools/matrix.py loads once for many plans.
        look: whether the forward pass is X-rayed, which tools/matrix.py has no use for.

    Raises:
        PlanError: the plan itself is at fault.
        RuntimeError: FlashAttention cannot be switched on in this process (``backend.activate``).
    """
    plan.check()
    uses_flash = plan.attention == "flash_attention_2"
    with state.environment_as_before():
        # First of all: under Transformers 4 it has to come before the libraries are imported.
        here = backend.activate() if uses_flash else backend.detect()
        path = resolve(plan.checkpoint)
        if plan.adapter is not None:
            adapter.read(plan.adapter)
        with state.as_before():
            if isinstance(path, Subject):
                with state.listening() as (heard, warned):
                    measured = _without_weights(plan, path, here)
            else:
                size = _weight_bytes(path)
                _few_threads(size)
                reference = _reference(path, plan, size)
                with state.listening() as (heard, warned):
                    measured = _measure(plan, path, here, reference, load, look)
                if (files := local_folder(path)) is not None:
                    measured = replace(
                        measured,
                        file_dtypes=file_dtypes(files),
                        declared_dtype=declared_dtype(files),
                    )
    return replace(
        measured,
        warnings=tuple(dict.fromkeys(str(w.message) for w in warned)),
        logs=tuple(dict.fromkeys(heard)),
        versions=versions(),
        backend=here.name,
        autocast_as_on_a_gpu=here.device == "cpu" and needs_a_gpu(plan, versions()),
        snippet=snippet(plan),
    )


def needs_a_gpu(plan: LoadPlan, versions: Versions) -> bool:
    """Whether the rescue cast of this plan asks for autocast on a GPU: Transformers 4 asks torch
    without naming the device (flash_attention_forward in its integrations/flash_attention.py)."""
    flash = plan.attention == "flash_attention_2"
    return flash and plan.uses_autocast and versions["transformers"].startswith("4.")


def resolve(checkpoint: Any) -> "str | Subject":
    """A checkpoint as ``from_pretrained`` takes it, or as a model that is built without weights
    where there are none on this machine: they are never downloaded here.

    Raises:
        PlanError: it is neither.
    """
    if checkpoint in checkpoints.available():
        return str(checkpoints.get(checkpoint))
    if isinstance(checkpoint, str) and checkpoint:
        if Path(checkpoint).is_dir():
            subjects.require_model(Path(checkpoint))
        if local_folder(checkpoint) is not None:
            return checkpoint
    return subjects.find(checkpoint)


def _without_weights(plan: LoadPlan, subject: Subject, here: backend.Backend) -> Outcome:
    """The forward pass of a plan at full size on tensors that have no data."""

    needy = [step for step in plan.after_load if step in NEED_WEIGHTS]
    if plan.adapter is not None or needy:
        what = "adapter=" if plan.adapter is not None else f"after_load with {needy[0]!r}"
        raise PlanError(
            f"The weights of {subject.name!r} are not on this machine, and {what} needs them: leave"
            " it out, or get the weights (hf download)."
        )
    default = plan.default_dtype or "float32"
    dtype = plan.dtype
    if dtype == "omitted":  # what Transformers makes of it: 4 the default dtype, 5 "auto"
        dtype = default if backend.is_old() else "auto"
    if dtype == "auto":
        dtype = subject.dtype or default
    started = time.perf_counter()
    with _autocast(plan, here):
        found = of_config(subject, How(), dtype, plan.attention, plan.after_load)
    if found.ok is None:
        raise PlanError(f"{subject.name} without its weights: {found.verdict}.")
    return Outcome(
        plan,
        stage="done" if found.ok else "forward",
        error_type=found.error_type,
        error=found.error,
        frames=found.frames,
        declared_dtype=subject.dtype,
        loaded_dtypes=found.loaded,
        changed_dtypes=found.parameters if plan.after_load else {},
        gate=found.gate,
        seconds=time.perf_counter() - started,
        xray=found,
    )


def _measure(
    plan: LoadPlan,
    path: str,
    here: backend.Backend,
    reference: "torch.Tensor | None",
    load: Loader,
    look: bool,
) -> Outcome:
    import torch

    from helpers.reading import frames

    outcome = Outcome(plan)
    seen: dict[str, list[GateRecord]] = {}
    started = time.perf_counter()
    try:
        model, tokenizer = load(plan, path, here.device)
        outcome = replace(outcome, stage="after_load", loaded_dtypes=parameter_dtypes(model))
        context = Context(tokenizer, plan.attention)
        for name, change in _changes(plan):
            with watch(model) as seen[name]:
                model = change(model, context)
            outcome = replace(outcome, changed_dtypes=parameter_dtypes(model))
        outcome = replace(outcome, stage="forward")
        model.eval()
        inputs = tokenizer(plan.question, return_tensors="pt").to(model.device)
        if not inputs["input_ids"].numel():
            raise PlanError(
                f"The tokenizer of {path!r} makes no token of {plan.question!r}: ask something, and"
                " give a folder that holds the tokenizer's files too."
            )
        with torch.inference_mode(), _autocast(plan, here):
            try:
                with traced(model, dict(inputs)) if look else watch(model) as found:
                    logits = model(**inputs).logits
                logits = logits.float().cpu()
            finally:
                if isinstance(found, Trace):
                    outcome = replace(outcome, xray=found.xray)
                    found = list(found.xray.gate)
                seen["forward"] = found
            outcome = replace(outcome, stage="generate", finite=bool(logits.isfinite().all()))
            if reference is not None:
                gap = float((logits - reference).abs().max())
                outcome = replace(outcome, max_logit_gap=gap)
            with watch(model) as seen["generate"]:
                text = answer(model, tokenizer, inputs)
        outcome = replace(outcome, stage="done", text=text)
    except PlanError:
        raise
    except Exception as error:
        if here.name != "flash_attn" and "kernels-community/" in _key(error):
            raise PlanError(
                "This architecture looks its attention up by the name 'flash_attention_2', which no"
                " kernel but the flash_attn package goes by: it runs with that package on a GPU, or"
                " here with attention='sdpa'."
            ) from error
        outcome = replace(
            outcome,
            error_type=type(error).__name__,
            error=str(error),
            frames=frames(error),
        )
    return replace(
        outcome,
        training_gate=tuple(seen.get("train", ())),
        gate=tuple(seen.get("generate") or seen.get("forward") or ()),
        seconds=time.perf_counter() - started,
    )


def _key(error: Exception) -> str:
    """What a KeyError missed."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else ""


def _changes(plan: LoadPlan) -> Iterator[tuple[str, Callable[[Any, Context], Any]]]:
    """What is done to the loaded model, by name: the plan's adapter, then its steps."""
    if plan.adapter is not None:
        folder = plan.adapter
        yield "adapter", lambda model, _: adapter.attach(model, folder)
    for name in plan.after_load:
        yield name, STEPS[name].apply


def _few_threads(size: int) -> None:
    """One thread for a small model: waking a second one takes longer than its share of the work,
    and much longer where a room of learners shares the cores."""
    import torch

    if 0 < size < SMALL:
        torch.set_num_threads(1)


def _weight_bytes(path: str) -> int:
    """The size of a checkpoint's files on this disk; 0 for a hub id that is not here yet."""
    if (folder := local_folder(path)) is None:
        return 0
    return sum(f.stat().st_size for end in ("safetensors", "bin") for f in folder.glob(f"*.{end}"))


def _dtype_argument(name: str) -> Any:
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def answer(model: Any, tokenizer: Any, inputs: Any) -> str:
    """What a model generates after the tokenized prompt, greedily."""
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _reference(path: str, plan: LoadPlan, size: int) -> "torch.Tensor | None":
    """The prompt's logits in float32; None where that does not run, or would fill the memory."""
    if 0 < size < REFERENCE_LIMIT:
        folder = None if plan.adapter is None else str(plan.adapter)
        files = _fingerprint(path) + (_fingerprint(folder) if folder else ())
        with contextlib.suppress(Exception), state.listening():
            return _reference_logits(path, folder, plan.question, files)
    return None


@functools.lru_cache(maxsize=16)
def _reference_logits(
    path: str, adapter_folder: str | None, question: str, fingerprint: tuple[int, ...]
) -> "torch.Tensor":
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
        if adapter_folder is not None:
            model = adapter.attach(model, adapter_folder).eval()
        inputs = AutoTokenizer.from_pretrained(path)(question, return_tensors="pt")
        logits: torch.Tensor = model(**inputs).logits
        return logits


def _fingerprint(path: str) -> tuple[int, ...]:
    """Changes when a folder's files do, so that a cached reference does not outlive them."""
    return tuple(f.stat().st_mtime_ns for f in sorted(Path(path).glob("*")) if f.is_file())


def _autocast(plan: LoadPlan, here: backend.Backend) -> Any:
    import torch

    if plan.autocast is None:
        return torch.autocast(here.device, enabled=False)  # whatever the caller of run() has on
    return torch.autocast(here.device, dtype=getattr(torch, plan.autocast))
