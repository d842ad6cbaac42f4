"""The diagnosis of an exception that is still there: its frames hold every dtype on the way.

Needs only the torch that raised it. A model is looked at as it is now, which is as it was when it
failed, unless somebody has changed it since.
"""

import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Optional

from helpers.doctor.diagnosis import Diagnosis, Shown
from helpers.doctor.evidence import Evidence, read
from helpers.doctor.remedies import remedies
from helpers.doctor.text import diagnose_text, title
from helpers.doctor.words import say

# Local variables of Transformers' models on the way to the kernel, in the order of the way.
STATIONS = (
    "inputs_embeds",
    "hidden_states",
    "query_states",
    "key_states",
    "value_states",
    "query",
    "key",
    "value",
    "target_dtype",
    "q",
    "k",
    "v",
    "qkv",
)
FLOAT32, HALF = "float32", ("float16", "bfloat16")


class Station(NamedTuple):
    """A local variable of a frame: where it is, what it is called, and of what dtype it is."""

    module: str
    function: str
    name: str
    dtype: str


class Seen(NamedTuple):
    """What the frames of an exception hold.

    Attributes:
        stations: the dtypes on the way, from the first frame to the last.
        model: the outermost module that was running; None if there is none.
        module: the path of the innermost one.
        parameters: dtypes of the model's floating parameters, by kind: "norm", "embedding",
            "adapter" and "other", each with how many there are.
        trains: whether a trainer's frame is there, or the model is in training mode.
        evaluates: whether a frame of an evaluation or a callback is there.
    """

    stations: "tuple[Station, ...]"
    model: Any
    module: str
    parameters: "dict[str, dict[str, int]]"
    trains: bool
    evaluates: bool


def why(error: "Optional[BaseException]" = None) -> Diagnosis:
    """Why the last exception was raised, or this one: in IPython also as ``%why``.

    Raises:
        ValueError: there is no exception.
    """
    error = error if error is not None else last()
    if error is None:
        raise ValueError("There is no exception to explain: run the cell that fails, then why().")
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
    by_text = diagnose_text(text)
    if "torch" not in sys.modules or error.__traceback__ is None:
        return by_text
    if by_text.cause is None and not by_text.candidates:
        return by_text
    seen = look(error.__traceback__)
    evidence = tuple(_shown(seen))
    evidence_of_text = read(text)
    if "dtype-refused" not in evidence_of_text.signs:
        return by_text._replace(evidence=(*by_text.evidence, *evidence))
    found = cause(seen)
    if found is None:
        return by_text._replace(evidence=(*by_text.evidence, *evidence))
    labels, because = found
    told = by_text._replace(
        candidates=labels, evidence=(*by_text.evidence, Shown(say("model"), because, ""), *evidence)
    )
    if len(labels) > 1:
        return told._replace(cause=None, certain=False, fixes=(), next_check=because)
    return told._replace(
        cause=labels[0],
        certain=True,
        fixes=remedies(labels[0], _with_versions(evidence_of_text)),
        next_check="",
        summary=title(labels[0]),
    )


def _with_versions(found: Evidence) -> Evidence:
    """The evidence of a text, with the versions that are here."""
    import importlib.metadata

    versions = dict(found.versions)
    for name in ("transformers", "torch", "peft", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found._replace(versions=versions)


def look(tb: "Optional[TracebackType]") -> Seen:
    """What the frames hold, from the first to the last."""
    import torch

    stations: list[Station] = []
    model, owner, names = None, None, {}
    trains = evaluates = False
    while tb is not None:
        frame = tb.tb_frame
        tb = tb.tb_next
        function, variables = frame.f_code.co_name, frame.f_locals
        mine = variables.get("self")
        if isinstance(mine, torch.nn.Module):
            if model is None:
                model = mine
                names = {id(module): name for name, module in model.named_modules()}
            owner = names.get(id(mine), owner)
        file = frame.f_code.co_filename.replace("\\", "/")
        trains = trains or function in ("training_step", "_inner_training_loop")
        evaluates = evaluates or function.startswith("on_") or function in BESIDE
        if "/torch/nn/modules/" in file:
            continue
        for name in STATIONS:
            dtype = getattr(variables.get(name), "dtype", variables.get(name))
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                short = str(dtype).partition(".")[2]
                station = Station(owner or "", function, name, short)
                if not stations or stations[-1] != station:
                    stations.append(station)
    if model is not None:  # what was trained has gradients, also in eval mode
        trains = trains or model.training or any(p.grad is not None for p in model.parameters())
    return Seen(tuple(stations), model, owner or "", parameters_by_kind(model), trains, evaluates)


BESIDE = ("evaluate", "evaluation_loop", "prediction_step", "validation_step", "compute_metrics")


def parameters_by_kind(model: Any) -> "dict[str, dict[str, int]]":
    """How many floating parameters of each kind have each dtype."""
    found: dict[str, dict[str, int]] = {}
    if model is None:
        return found
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtypes = found.setdefault(_kind(name, parameter), {})
            short = str(parameter.dtype).partition(".")[2]
            dtypes[short] = dtypes.get(short, 0) + 1
    return found


def _kind(name: str, parameter: Any) -> str:
    low = name.lower()
    if "lora_" in low or "adapter" in low:
        return "adapter"
    if "norm" in low or "ln_" in low or (parameter.dim() == 1 and low.endswith(".weight")):
        return "norm"
    return "embedding" if "embed" in low or "lm_head" in low else "other"


def cause(seen: Seen) -> "Optional[tuple[tuple[str, ...], str]]":
    """The cause of a q that is not half, or several where frames do not tell them apart, and the
    words for it; None where they tell nothing."""
    dtypes = {kind: set(found) for kind, found in seen.parameters.items()}
    base = dtypes.get("other", set())
    if base == {FLOAT32}:
        if seen.evaluates or seen.trains:
            return ("missing-autocast",), say("All weights are float32, and they are trained.")
        if declared(seen.model) in HALF:
            why = say("All weights are float32, though the config says half: who cast them?")
            return ("kbit-prep", "weights-fp32"), why
        return ("weights-fp32",), say("All weights are float32.")
    if not base or not base <= set(HALF):
        return None
    embeds = next((s for s in seen.stations if s.name == "inputs_embeds"), None)
    if (
        embeds is not None
        and embeds.dtype == FLOAT32
        and FLOAT32 not in dtypes.get("embedding", ())
    ):
        return ("inputs-fp32",), say("The weights are half, and inputs_embeds came as float32.")
    if FLOAT32 in dtypes.get("adapter", ()):
        return ("adapter-fp32",), say("The base model is half, and the adapter is float32.")
    if FLOAT32 in dtypes.get("norm", ()) or FLOAT32 in dtypes.get("embedding", ()):
        return ("kbit-prep",), say("Projections are half, and norms or embeddings are float32.")
    return ("upcast-module",), say("All weights are half: something in between returns float32.")


def declared(model: Any) -> "Optional[str]":
    """The dtype that a model's config names, which no later cast changes."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return str(dtype).rpartition(".")[2] if dtype is not None else None


def _shown(seen: Seen) -> Iterator[Shown]:
    for station in seen.stations:
        where = f"{station.module or station.function}: {station.name}"
        yield Shown(say("frame"), where, station.dtype)
    for kind, dtypes in sorted(seen.parameters.items()):
        counts = ", ".join(f"{number} {dtype}" for dtype, number in sorted(dtypes.items()))
        yield Shown(say("parameters"), kind, counts)


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext helpers.doctor.live`` gives ``%why``."""
    shell.register_magic_function(lambda line: why(), "line", "why")
