"""What an X-ray shows: an XRay, read from what the tracer and the gate saw."""

import itertools
import json
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from helpers import river
from helpers.probe import GateRecord
from helpers.style import STYLE_TAG
from helpers.tracer import PASSED_OVER, Operation, Origin, Returned, Tracer, line_at

WITHOUT_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


# Frames that are in a traceback because somebody watches the operations.
WATCHING = ("torch/_compile.py", "torch/_dynamo/", "torch/_ops.py", "torch/_subclasses/")


NARROW = ("bfloat16", "float16")
ON_CUDA = (
    "a layer norm of {} numbers with float32 weights runs on the CPU, as here, and raises 'expected"
    " scalar type ... but found Float' on CUDA (https://github.com/pytorch/pytorch/issues/138128;"
    " not run here)."
)


class Call(NamedTuple):
    """An attention call: its record, how many operations there were before it, and where the
    float32 of q, k and v came in."""

    record: GateRecord
    before: int
    origins: tuple[Origin | None, ...]


class Station(NamedTuple):
    """A place on the road of a layer, and the dtype that passed there."""

    name: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}"


class Layer(NamedTuple):
    """One attention call on the road: what arrived, what the rescue made of it, and whether the
    kernel took it (None where none was asked)."""

    name: str
    q: str
    k: str
    v: str
    after_rescue: str | None
    accepted: bool | None
    rescue: str | None
    stations: tuple[Station, ...]


class Harmless(NamedTuple):
    """float32 that reaches neither the gate nor a matmul of two dtypes: what it is, in which
    modules, how often, and the first line of it."""

    what: str
    modules: str
    times: int
    line: str


@dataclass(frozen=True, repr=False)
class XRay:
    """What a forward pass showed.

    Attributes:
        subject: the model, in words.
        ok: True passes, False fails, None could not tell.
        verdict: one sentence: passes; or fails, with the message and its line; or what stopped it.
        error_type, error: the exception's class name and text; None where nothing was raised.
        at: the module and the line that raised it.
        frames: the traceback as Python prints it, most recent call last, one string a frame.
        first_float32: where the float32 came in that reached the gate or a matmul of two dtypes,
            or that the rescue cast took away; None where there was none.
        layers: one a attention call, in the order of the calls.
        harmless: the float32 that is meant, and went nowhere.
        gate: the records behind the layers.
        operations: every one, in order.
        loaded, parameters: dtypes of the parameters with their number of tensors, as they were
            built and when it ran; the first is empty for a live model.
        weightless: it ran on tensors that have a shape and a dtype and no data.
        logs: what the libraries logged.
        notes: what to know besides.
        versions, backend: what it holds for.
    """

    subject: str
    ok: bool | None
    verdict: str
    error_type: str | None = None
    error: str | None = None
    at: str | None = None
    frames: tuple[str, ...] = field(default=(), repr=False)
    first_float32: Origin | None = None
    layers: tuple[Layer, ...] = ()
    harmless: tuple[Harmless, ...] = ()
    gate: tuple[GateRecord, ...] = field(default=(), repr=False)
    operations: tuple[Operation, ...] = field(default=(), repr=False)
    loaded: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    weightless: bool = False
    logs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    backend: str = ""

    def to_json(self) -> str:
        """The same as a JSON object, without the single operations."""
        data = {
            key: value for key, value in vars(self).items() if key not in ("gate", "operations")
        }
        data["first_float32"] = self.first_float32 and self.first_float32._asdict()
        data["layers"] = [
            {**layer._asdict(), "stations": [station._asdict() for station in layer.stations]}
            for layer in self.layers
        ]
        data["harmless"] = [one._asdict() for one in self.harmless]
        data["river"] = river.data(self)
        return json.dumps({**data, "operations": len(self.operations)}, indent=2)

    def __str__(self) -> str:
        return f"{self.subject}: {self.verdict}"

    def __repr__(self) -> str:
        return river.text(self)

    def _repr_html_(self) -> str:
        return STYLE_TAG + river.html(self)


def read(
    name: str, tracer: Tracer, calls: list[Call], error: Exception | None, given: bool
) -> XRay:
    operations = tuple(tracer.operations())
    layers = tuple(_layer(tracer, operations, call) for call in calls)
    first, harmful = _first_float32(tracer, calls, error)
    found = XRay(
        name,
        True,
        _passes(calls),
        first_float32=first,
        layers=layers,
        harmless=_harmless(tracer, harmful),
        gate=tuple(call.record for call in calls),
        operations=operations,
        notes=tuple(_else_on_a_gpu(operations)),
    )
    if error is None:
        return found
    at = _at(tracer, error)
    found = replace(
        found, error_type=type(error).__name__, error=str(error), at=at, frames=frames(error)
    )
    if isinstance(error, WITHOUT_DATA):
        stopped = tracer.refused.operation if tracer.refused else type(error).__name__
        words = f"could not tell: {stopped} asks for numbers that nobody has here ({at})"
        return replace(found, ok=None, verdict=words)
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    in_kernel = any("reference_kernel" in frame.filename for frame in _stack(error))
    if isinstance(error, NotImplementedError) and layers and in_kernel:  # what it lacks
        layers = (*layers[:-1], layers[-1]._replace(accepted=None))
        return replace(found, ok=None, layers=layers, verdict=f"could not tell: {said} ({at})")
    if given or _decides(error, tracer):
        return replace(found, ok=False, verdict=f"fails: {said} ({at})")
    return replace(found, ok=None, verdict=f"could not tell: {said} ({at})")


def _else_on_a_gpu(operations: tuple[Operation, ...]) -> Iterator[str]:
    """What the CPU computes and CUDA refuses: a layer norm of 16 bit with float32 weights."""
    if torch.is_autocast_enabled("cpu"):  # on a GPU autocast makes all of it float32
        return
    mixed = [
        operation
        for operation in operations
        if operation.name.startswith(("aten.native_layer_norm", "aten.layer_norm"))
        and operation.inputs[0] in NARROW
        and "float32" in operation.inputs[1:]
    ]
    if mixed:
        yield f"{ranged([one.module for one in mixed])}: {ON_CUDA.format(mixed[0].inputs[0])}"


def _decides(error: Exception, tracer: Tracer) -> bool:
    """Whether an exception is about dtypes, or of the attention function, and not about inputs that
    do not suit the model."""
    if tracer.refused is not None and tracer.refused.error is error:
        return len(set(tracer.refused.operands)) > 1 and "type" in str(error)
    files = [frame.filename for frame in _stack(error)]
    about = re.search(r"dtype|(?:scalar|input|bias|weight|data) type|type promot", str(error), re.I)
    return about is not None or any("flash_attention" in Path(file).name for file in files)


def _at(tracer: Tracer, error: Exception) -> str:
    """The module and the line that raised it."""
    own = [frame for frame in _stack(error) if not frame.filename.startswith(PASSED_OVER)]
    line = line_at(own[-1].filename, own[-1].lineno or 0) if own else "no line of the model"
    return f"{tracer.module or 'the model itself'}, {line}"


def _passes(calls: list[Call]) -> str:
    if not calls:
        return (
            "passes, but no attention call was seen: the model goes through no attention interface"
            " of Transformers, and no FlashAttention kernel was entered"
        )
    arrived = _distinct(call.record.kernel for call in calls if call.record.kernel)
    if not arrived:
        came = _distinct(call.record.attention_input for call in calls)
        return f"passes: no FlashAttention kernel was asked; attention got {came}"
    rescued = sum(call.record.attention_input != call.record.kernel for call in calls)
    words = f"passes: FlashAttention got {arrived} in {len(calls)} attention calls"
    return f"{words}, {rescued} of them after the rescue cast" if rescued else words


def _first_float32(
    tracer: Tracer, calls: list[Call], error: Exception | None
) -> tuple[Origin | None, set[Origin]]:
    """The float32 that did it, and all that reached the gate or a matmul of two dtypes."""
    reached = [origin for call in calls for origin in call.origins if origin is not None]
    if error is not None and tracer.refused is not None and tracer.refused.error is error:
        culprit = tracer.refused.origin
        return culprit, {*reached, *([culprit] if culprit else [])}
    if error is not None and calls:
        last = [origin for origin in calls[-1].origins if origin is not None]
        return next(iter(last), None), set(reached)
    return next(iter(reached), None), set(reached)


def _layer(tracer: Tracer, operations: tuple[Operation, ...], call: Call) -> Layer:
    record = call.record
    q, k, v = record.attention_input
    return Layer(
        record.layer,
        q,
        k,
        v,
        str(record.kernel) if record.kernel else None,
        record.accepted,
        record.rescue,
        tuple(_stations(tracer, operations, call)),
    )


def _stations(tracer: Tracer, operations: tuple[Operation, ...], call: Call) -> Iterator[Station]:
    """The road of a layer to its attention call, from what the modules returned before it."""
    own = call.record.layer
    starts = [order for order, path in tracer.entered if path == own and order <= call.before]
    start = starts[-1] if starts else call.before
    before = [one for one in tracer.returned if one.order <= start and one.dtypes]
    inside = [
        one
        for one in tracer.returned
        if start <= one.order <= call.before and one.module.startswith(f"{own}.") and one.dtypes
    ]
    road = [o for o in operations[start : call.before] if o.module == own]
    if embedded := [one for one in before if _is(one, "embed") and not _is(one, "rotary", "rope")]:
        nearest = max(embedded, key=lambda one: (_shared(one.module, own), one.order))
        yield Station("embedding", _distinct(nearest.dtypes))
    elif given := [name for name in tracer.inputs if name.endswith("embeds")]:
        yield Station(given[0], tracer.inputs[given[0]])
    if norms := [one for one in before if _is(one, "norm", "ln_")]:
        yield Station("norm", _distinct(norms[-1].dtypes))
    projections = {
        one.module: _distinct(one.dtypes)
        for one in inside
        if one.kind == "Conv1D" or "Linear" in one.kind
    }
    if outer := {  # an adapter's own layers lie inside the layer that it changes
        module.removeprefix(f"{own}."): dtypes
        for module, dtypes in projections.items()
        if not any(module.startswith(f"{other}.") for other in projections)
    }:
        yield Station("projection", _by_name(outer))
    if normed := {
        one.module.removeprefix(f"{own}."): _distinct(one.dtypes)
        for one in inside
        if _is(one, "norm")
    }:
        yield Station("q/k norm", _by_name(normed))
    if turned := [o for o in road if "rot" in o.function and o.outputs]:
        yield Station("rotary", _distinct([call.record.attention_input.q, *turned[-1].outputs]))
    if kept := [o for o in road if o.file.endswith("cache_utils.py") and o.outputs]:
        yield Station("cache", _distinct(x for o in kept for x in o.outputs if "float" in x))
    yield Station("attention input", str(call.record.attention_input))
    if call.record.kernel is not None:
        yield Station("gate", str(call.record.kernel))


def _is(one: Returned, *words: str) -> bool:
    text = f"{one.module.rpartition('.')[2]} {one.kind}".lower()
    return any(word in text for word in words)


def _shared(one: str, other: str) -> int:
    """How many parts of two module paths are the same from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _by_name(dtypes: dict[str, str]) -> str:
    """One dtype where all agree, else each with its name."""
    if len(set(dtypes.values())) == 1:
        return next(iter(dtypes.values()))
    return ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())


def _distinct(values: Iterable[object]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))


def _harmless(tracer: Tracer, harmful: set[Origin]) -> tuple[Harmless, ...]:
    """The float32 that went nowhere, alike ones together."""
    kinds = {one.module: one.kind for one in tracer.returned}
    alike: dict[tuple[str, str, str], list[str]] = {}
    for origin in tracer.origins:
        if origin in harmful or "scaled_dot_product" in origin.operation:
            continue
        if origin.kind == "parameter" and tracer.joined.get(origin) in harmful:
            continue  # a float32 weight that float32 met on its way
        what = _meant(origin, kinds.get(origin.module, ""))
        key = (what, re.sub(r"\d+", "*", origin.module), origin.line)
        alike.setdefault(key, []).append(origin.module)
    return tuple(
        Harmless(what, ranged(modules), len(modules), line)
        for (what, _, line), modules in alike.items()
    )


def _meant(origin: Origin, kind: str) -> str:
    """What a harmless float32 is for."""
    text = f"{origin.module.rpartition('.')[2]} {kind} {origin.function}".lower()
    if "rot" in text or "rope" in text:
        return "rotary tables"
    if "lora" in f"{origin.module} {origin.line}".lower():
        return "LoRA"
    if "softmax" in origin.operation:
        return "softmax"
    if "cache_utils" in origin.line:
        return "an empty cache"
    if "norm" in text:
        return "norm"
    if "router" in text or "topk" in text or origin.module.endswith(".gate"):
        return "router"
    return {"parameter": "a float32 parameter", "input": "an input", "buffer": "a buffer"}.get(
        origin.kind, "other"
    )


def ranged(paths: Sequence[str]) -> str:
    """Module paths that differ in their numbers as one: ``model.layers.0-79.self_attn``."""
    first, last = paths[0].split("."), paths[-1].split(".")
    if len(first) != len(last) or len(paths) == 1:
        return paths[0]
    return ".".join(a if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def frames(error: BaseException) -> tuple[str, ...]:
    """The frames of the libraries, without this package's own and with paths from site-packages."""
    own = Path(__file__).parent
    frames = []
    for frame in _stack(error):
        file = Path(frame.filename)
        if own in file.parents and "reference_kernel" not in file.parts:
            continue
        where = file.relative_to(own.parent) if own in file.parents else file
        short = re.split("site-packages/", where.as_posix())[-1]
        if short.startswith(WATCHING):
            continue
        frames.append(traceback.FrameSummary(short, frame.lineno, frame.name, line=frame.line))
    return tuple(line.rstrip() for line in traceback.format_list(frames))


def _stack(error: BaseException) -> traceback.StackSummary:
    """The frames of a traceback; their lines are read when asked for, because some of the files
    that are passed over are large."""
    walked = traceback.walk_tb(error.__traceback__)
    return traceback.StackSummary.extract(walked, lookup_lines=False)
