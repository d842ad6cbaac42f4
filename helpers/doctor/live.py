"""The diagnosis of an exception that is still there: its frames hold every dtype on the way.

Needs only the torch that raised it.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Optional

from helpers.doctor.diagnosis import Diagnosis, Shown, title
from helpers.doctor.evidence import Evidence, read
from helpers.doctor.frames import (
    FLOAT32,
    HALF,
    Seen,
    V,
    asked,
    declared,
    is_adapter,
    is_quantised,
    look,
)
from helpers.doctor.remedies import remedies, remedies_of
from helpers.doctor.text import check, diagnose_evidence
from helpers.doctor.words import noted, say, speaking


class Cause(NamedTuple):
    """Labels that the frames leave, what shows it, and what they do not show."""

    labels: "tuple[str, ...]"
    because: str
    unseen: str = ""
    cast: bool = False  # the model was cast after it was loaded


def why(error: "Optional[BaseException]" = None, *, language: "Optional[str]" = None) -> Diagnosis:
    """Why the last exception was raised, or this one: in IPython also as ``%why``.

    Args:
        error: an exception; by default the last that nobody caught.
        language: "en" or "zh-CN"; by default the one that is spoken, which is English at first.

    Raises:
        ValueError: there is no exception, or no such language.
    """
    with speaking(language) if language else contextlib.nullcontext():
        error = error if error is not None else last()
        if error is None:
            raise ValueError(
                say("There is no exception to explain: run the cell that fails, then why().")
            )
        return diagnose_exception(error)


def last() -> "Optional[BaseException]":
    """The last exception that nobody caught in this session."""
    found: Optional[BaseException] = getattr(sys, "last_exc", None) or getattr(
        sys, "last_value", None
    )
    return found


def diagnose_exception(error: BaseException) -> Diagnosis:
    """What an exception and its frames show."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    evidence = read(text)
    by_text = diagnose_evidence(evidence)
    if "torch" not in sys.modules or error.__traceback__ is None or not by_text.is_ours:
        return by_text
    seen = look(error.__traceback__)
    found = cause(seen)
    if "dtype-refused" in evidence.signs or is_input(by_text, found):
        return decided(by_text, found, shown(seen), with_versions(evidence))
    return by_text._replace(evidence=(*by_text.evidence, *shown(seen)))


def is_input(by_text: Diagnosis, found: "Optional[Cause]") -> bool:
    """Whether a matmul of two dtypes failed because of an input, on its way to the kernel."""
    ends = by_text.cause == "matmul-dtype-mismatch"
    return ends and found is not None and found.labels == ("inputs-fp32",)


def decided(
    by_text: Diagnosis, found: "Optional[Cause]", frames: "Iterable[Shown]", evidence: Evidence
) -> Diagnosis:
    """A diagnosis by the text, with what the frames or the model decide."""
    if found is None:
        unseen = Shown(say("not seen"), say("Where q became float32: no frame shows it."), "")
        return by_text._replace(evidence=(*by_text.evidence, unseen, *frames))
    more = [Shown(say("model"), found.because, "")]
    if found.unseen:
        more.append(Shown(say("not seen"), found.unseen, ""))
    told = by_text._replace(
        candidates=found.labels,
        evidence=(*by_text.evidence, *more, *frames),
        ruled_out=tuple(label for label in by_text.ruled_out if label not in found.labels),
    )
    if len(found.labels) > 1:
        return told._replace(
            cause=None,
            certain=False,
            fixes=remedies_of(found.labels, evidence),
            next_check=check(found.labels),
            summary=say("The frames do not decide between these causes."),
        )
    label = found.labels[0]
    return told._replace(
        cause=label,
        certain=True,
        fixes=remedies(label, evidence, cast=found.cast),
        next_check="",
        summary=title(label),
    )


def with_versions(found: Evidence) -> Evidence:
    """The evidence of a text, with the versions and the GPUs that are here."""
    import importlib.metadata

    import torch

    versions = dict(found.versions)
    for name in ("transformers", "torch", "peft", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = found.gpus
    if torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found._replace(versions=versions, gpus=gpus)


def cause(seen: Seen) -> "Optional[Cause]":
    """The cause of a q that is not half, or several where the frames do not tell them apart; None
    where they tell nothing."""
    if seen.model is None:
        return _without_a_model(seen)
    dtypes = {kind: set(found) for kind, found in seen.parameters.items()}
    base = dtypes.get("other", set())
    quantised = is_quantised(seen.model)
    if base == {FLOAT32} and not (quantised and seen.dtype("hidden_states") in HALF):
        return _all_float32(seen, quantised)
    return _half(seen, dtypes, quantised)


def _without_a_model(seen: Seen) -> "Optional[Cause]":
    """The kernel was called by hand, or the frames of the model are gone."""
    q, v = seen.dtype("query", "query_states", "q"), seen.dtype(*V)
    before = next((one.dtype for one in seen.stations if one.name == "q"), None)
    if q == FLOAT32 and (v in HALF or before in HALF):
        if before in HALF:
            because = say("q is half in the caller, and float32 where the kernel gets it.")
        else:
            because = say("v reaches the kernel in half precision, and q in float32.")
        return Cause(("upcast-module",), because)
    return None


def _all_float32(seen: Seen, quantised: bool) -> Cause:
    """Every weight of the model is float32."""
    if quantised:
        because = say("The config names a quantisation, and the weights were unpacked to float32.")
        return Cause(("quantization-compute-dtype",), because)
    if seen.autocast == "on":
        because = say("The weights are float32, and the frames run through autocast.")
        return Cause(("upcast-module",), because)
    if seen.dtype(*V) in HALF:
        because = say("The weights are float32 and v is half, so autocast is on; q is float32.")
        return Cause(("upcast-module",), because)
    if seen.evaluates or seen.trains:
        because = say("All weights are float32, and the model is in training or beside it.")
        return Cause(("missing-autocast",), because)
    if declared(seen.model) not in HALF:
        return Cause(("weights-fp32",), say("All weights are float32."))
    because = say("All weights are float32, though the config says half: they were cast later.")
    if any(p.requires_grad for p in seen.model.parameters()):
        return Cause(("weights-fp32",), because, cast=True)
    if seen.prepares:
        known = say("They are frozen, and the code calls prepare_model_for_kbit_training.")
        return Cause(("kbit-prep",), f"{because} {known}")
    unseen = say("Who cast them: frames show what was running, and not what was done before.")
    return Cause(("kbit-prep", "weights-fp32"), because, unseen)


def _half(seen: Seen, dtypes: "dict[str, set[str]]", quantised: bool) -> "Optional[Cause]":
    """The weights of the projections are half, or quantised."""
    float_kinds = [kind for kind in ("norm", "embedding") if FLOAT32 in dtypes.get(kind, ())]
    if seen.dtype("inputs_embeds") == FLOAT32 and "embedding" not in float_kinds:
        because = say("The weights are half, and inputs_embeds came as float32.")
        return Cause(("inputs-fp32",), because)
    hidden = _of_inner(seen, "hidden_states", "x")
    if hidden == FLOAT32 and float_kinds:
        because = say("Projections are half, and norms or embeddings are float32.")
        return Cause(("kbit-prep",), because)
    if hidden in HALF:
        made = asked(seen.inner, hidden)
        wide = [name for name, dtype in made.items() if dtype == FLOAT32]
        if wide:
            return _projection(seen, wide, quantised)
        if made and set(made.values()) <= set(HALF):
            because = say(
                "Projections and norms of {module} return half: what stands between them and the"
                " kernel returns float32."
            ).format(module=seen.module or type(seen.inner).__name__)
            return Cause(("upcast-module",), because)
    left = ["upcast-module"]
    left += ["adapter-fp32"] if FLOAT32 in dtypes.get("adapter", ()) else []
    left += ["kbit-prep"] if float_kinds else []
    left += ["quantization-compute-dtype"] if quantised else []
    if len(left) > 1:
        unseen = say("Which step of the attention returns float32: its modules could not be asked.")
        return Cause(tuple(left), say("The projections are not float32."), unseen)
    because = say("All weights are half: something in between returns float32.")
    return Cause(("upcast-module",), because)


def by_origin(seen: Seen, origin: Any) -> Cause:
    """The cause for a model whose first float32 an X-ray has found.

    Args:
        seen: of the model; without frames.
        origin: a ``helpers.tracer.Origin``, or None.
    """
    dtypes = {kind: set(found) for kind, found in seen.parameters.items()}
    if dtypes.get("other", set()) == {FLOAT32}:
        return _all_float32(seen, is_quantised(seen.model))
    if origin is None:
        labels = ("upcast-module", "adapter-fp32", "kbit-prep")
        return Cause(labels, say("The projections are not float32."), say("The first float32."))
    because = say("The first float32 is {origin}.").format(origin=told(origin))
    if origin.kind == "input":
        return Cause(("inputs-fp32",), because)
    own = [name for name, _ in seen.model.get_submodule(origin.module).named_children()]
    if is_adapter([origin.name] if origin.kind == "parameter" else own):
        return Cause(("adapter-fp32",), because)
    if origin.kind == "parameter":
        norms = dtypes.get("norm", set()) | dtypes.get("embedding", set())
        if norms == {FLOAT32}:  # one norm alone is a choice of the model, all are a preparation
            return Cause(("kbit-prep",), because)
    return Cause(("upcast-module",), because)


ORIGINS = {  # the words of helpers.tracer.Origin, which another language has to say, too
    "parameter": noted("the {dtype} parameter {name}"),
    "buffer": noted("the {dtype} buffer {name}"),
    "input": noted("the {dtype} input {name}"),
    "cast": noted("a cast to {dtype}"),
    "created": noted("an operation that returns {dtype}"),
}


def told(origin: Any) -> str:
    """Where a float32 came in: what brought it, the module, the operation and the line."""
    what = say(ORIGINS[origin.kind]).format(dtype=origin.dtype, name=origin.name)
    where = origin.module or say("the model itself")
    return say("{what} in {where}, {operation} ({line})").format(
        what=what, where=where, operation=origin.operation, line=origin.line
    )


def _of_inner(seen: Seen, *names: str) -> "Optional[str]":
    """The dtype in which the innermost module gets its input."""
    return next(
        (one.dtype for one in seen.stations if one.module == seen.module and one.name in names),
        None,
    )


def _projection(seen: Seen, wide: "list[str]", quantised: bool) -> Cause:
    """Modules of the attention that make float32 of half."""
    because = say("{module} makes float32 of half.").format(
        module=", ".join(f"{seen.module}.{name}".lstrip(".") for name in wide)
    )
    children = [child for name, child in seen.inner.named_children() if name in wide]
    if is_adapter([name for child in children for name, _ in child.named_parameters()]):
        return Cause(("adapter-fp32",), because)
    if quantised and not all("norm" in name for name in wide):
        return Cause(("quantization-compute-dtype",), because)
    return Cause(("upcast-module",), because)


AUTOCAST = {"on": noted("on in this call"), "off": noted("off in this call")}


def shown(seen: Seen) -> Iterator[Shown]:
    """The frames in words: each module's tensors, the first float32, autocast, the config."""
    frames: dict[tuple[str, str], dict[str, str]] = {}
    for one in seen.stations:
        frames.setdefault((one.module, one.function), {})[one.name] = one.dtype
    for (module, function), dtypes in frames.items():
        where = f"{module} ({function})" if module else function
        means = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        yield Shown(say("frame"), where, means)
    first = next((one for one in seen.stations if one.dtype == FLOAT32), None)
    if first is not None:
        where = f"{first.module or first.function}: {first.name}"
        yield Shown(say("first float32"), where, say("No frame before it holds a float32 tensor."))
    counts = [
        f"{kind} {number} {dtype}"
        for kind, counted in sorted(seen.parameters.items())
        for dtype, number in sorted(counted.items())
    ]
    if counts:
        yield Shown(say("parameters"), ", ".join(counts), "")
    if seen.model is not None:
        tells = say(AUTOCAST[seen.autocast]) if seen.autocast else say("not to be seen in frames")
        yield Shown(say("autocast"), tells, "")
        attention = getattr(getattr(seen.model, "config", None), "_attn_implementation", None)
        if declared(seen.model) or attention:
            named = f"dtype {declared(seen.model)}, attn_implementation {attention}"
            yield Shown(say("config"), type(seen.model).__name__, named)


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext helpers.doctor.live`` gives ``%why``, and ``%why zh-CN`` in Chinese."""
    shell.register_magic_function(lambda line: why(language=line.strip()), "line", "why")
