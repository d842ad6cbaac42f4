"""The X-ray: where float32 comes in, and whether it reaches the gate.

A live model runs its own forward. A config runs at its own size on tensors that have no data.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import backend, state, subjects
from helpers.errors import PlanError
from helpers.files import first_sentence, listed, shortened
from helpers.plan import LoadPlan
from helpers.probe import GateRecord, parameter_dtypes, watch
from helpers.steps import NEED_WEIGHTS, STEPS, Context

if TYPE_CHECKING:
    from helpers.reading import XRay
    from helpers.subjects import Subject
    from helpers.tracer import Tracer
    from helpers.weightless import Weightless

CACHES = (None, "dynamic", "static")


def xray(
    what: Any,
    inputs: Any = None,
    *,
    dtype: str | None = None,
    attention: str = "flash_attention_2",
    autocast: str | None = None,
    after_load: tuple[str, ...] = (),
    size: str | None = None,
    cache: str | None = None,
    decode: bool = False,
    trust_remote_code: bool = False,
) -> "XRay":
    """Run one forward pass and show every dtype on the way to the gate.

    A live model runs its own forward, in its own mode, and is left as it was: gradients, mode,
    hooks, buffers, random state. Anything else becomes a model without weights, on tensors that
    have a shape and a dtype and no data.

    Args:
        what: a model, with PEFT or not; or a name from ``subjects.known()`` or
            ``checkpoints.available()``, a folder, a hub id, or a config.
        inputs: what the forward gets: a dictionary, or token ids; by default something small that
            the architecture takes.
        dtype: as ``from_pretrained(dtype=...)``; None and "auto" mean what the checkpoint says. Not
            for a live model, which has its dtypes.
        attention: as ``attn_implementation=``. Not for a live model.
        autocast: the dtype of a region around the forward; None leaves a live model in the regions
            it is called in.
        after_load: steps from ``steps.STEPS`` that change the model before. Not for a live model.
        size: "full" shows a live model on tensors without data too.
        cache: "dynamic" or "static": keep the keys and values, as in generation. Default: none.
        decode: after the prompt, show the pass of one more token, with the cache.
        trust_remote_code: whether Python code that comes with a checkpoint may run.

    Raises:
        PlanError: an argument is at fault.
        RuntimeError: FlashAttention cannot be switched on in this process (``backend.activate``).
    """
    import torch

    plan = LoadPlan(
        dtype="auto" if dtype is None else dtype,
        attention=attention,
        autocast=autocast,
        after_load=after_load,
    )
    if needy := [step for step in plan.after_load if step in NEED_WEIGHTS]:
        raise PlanError(
            f"after_load has {needy[0]!r}, which needs weights: do it to a model, and give that."
        )
    plan.check()
    for name, value, known in (("size", size, (None, "full")), ("cache", cache, CACHES)):
        if value not in known:
            raise PlanError(f"{name}={value!r} is not known: use one of {listed(known)}.")
    is_live = isinstance(what, torch.nn.Module)
    if is_live and (dtype is not None or plan.after_load or attention != "flash_attention_2"):
        raise PlanError(
            "A live model has its dtypes, its attention and its adapters: leave out dtype=,"
            " attention= and after_load=, or give its config."
        )
    how = How(inputs, plan.autocast, "dynamic" if decode and cache is None else cache, decode)
    with state.as_before(), state.listening() as (heard, _warned):
        # A live model found its kernel when it was made, or says by itself what it lacks.
        switch_on = attention == "flash_attention_2" and not is_live
        here = backend.activate() if switch_on else backend.detect()
        if is_live:
            found = _of_live(what, how, weightless=size == "full")
        else:
            subject = subjects.find(what, trust_remote_code)
            wanted = subject.dtype if plan.dtype in ("auto", "omitted") else plan.dtype
            found = of_config(subject, how, wanted, attention, plan.after_load)
    logs = tuple(dict.fromkeys(heard))
    return replace(found, logs=logs, versions=backend.versions(), backend=here.name)


class How(NamedTuple):
    """How the forward is called."""

    inputs: Any = None
    autocast: str | None = None
    cache: str | None = None
    decode: bool = False


def of_config(
    subject: "Subject", how: How, dtype: str | None, attention: str, steps: tuple[str, ...]
) -> "XRay":
    """The X-ray of a model that is built without weights; FlashAttention is switched on already."""
    import torch

    from helpers.weightless import Weightless

    with torch.random.fork_rng(devices=[]), Weightless() as mode, torch.no_grad():
        try:
            model = subjects.build(subject.config, dtype, attention)
        except PlanError:
            raise
        except Exception as error:  # what building a model raises, there is no list of
            raise PlanError(
                f"{subject.name} cannot be built from its config ({type(error).__name__}:"
                f" {first_sentence(error)}): give another config, or a live model."
            ) from error
        loaded = parameter_dtypes(model)
        for step in steps:
            model = STEPS[step].apply(model, Context(None, attention))
        found = of_built(model, how, mode)
    name = f"{subject.name} ({type(model).__name__}, {', '.join((dtype or 'omitted', *steps))})"
    notes = found.notes
    if (quantization := getattr(subject.config, "quantization_config", None)) is not None:
        method = dict(quantization).get("quant_method", "unknown")
        notes = (
            f"The config asks for quantization ({method}); without weights none was done.",
            *notes,
        )
    return replace(found, subject=name, loaded=loaded, notes=notes)


def of_built(model: Any, how: How, mode: "Weightless") -> "XRay":
    """The X-ray of a model that was built in this mode."""
    inputs, given = _inputs(model, how)
    tracer = _tracer(model, inputs, model.named_parameters(), model.named_buffers())
    return _marked(_look(model, model, inputs, how, tracer, mode.shown_to(tracer), given), mode)


def _marked(found: "XRay", mode: "Weightless") -> "XRay":
    """With what is to be known of an X-ray without data."""
    from helpers.weightless import ASSUMED

    notes = (*found.notes, ASSUMED) if mode.assumed else found.notes
    return replace(found, weightless=True, notes=notes)


def _of_live(model: Any, how: How, weightless: bool) -> "XRay":
    import torch

    from helpers.tracer import Watching
    from helpers.weightless import Weightless

    inputs, given = _inputs(model, how)
    with _left_as_it_was(model), torch.set_grad_enabled(torch.is_grad_enabled() and model.training):
        if not weightless:
            tracer = _tracer(model, inputs, model.named_parameters(), model.named_buffers())
            return _look(model, model, inputs, how, tracer, Watching(tracer), given)
        with Weightless() as mode:
            weights = [(name, mode.from_tensor(p)) for name, p in model.named_parameters()]
            buffers = [(name, mode.from_tensor(b)) for name, b in model.named_buffers()]
            tracer = _tracer(model, inputs, weights, buffers)

            def forward(**kwargs: Any) -> Any:
                tensors: dict[str, torch.Tensor] = dict([*weights, *buffers])
                return torch.func.functional_call(model, tensors, kwargs=kwargs)

            found = _look(model, forward, inputs, how, tracer, mode.shown_to(tracer), given)
    return _marked(found, mode)


class Trace:
    """Of a forward pass in ``traced``: ``xray`` is there after the block."""

    xray: "XRay"


@contextmanager
def traced(model: Any, inputs: dict[str, Any]) -> Iterator[Trace]:
    """X-ray the forward pass that the block makes; what it raises goes on."""
    from helpers.tracer import Watching

    tracer = _tracer(model, inputs, model.named_parameters(), model.named_buffers())
    with _traced(model, tracer, Watching(tracer), True) as trace:
        yield trace


@contextmanager
def _traced(model: Any, tracer: "Tracer", shown: Any, given: bool) -> Iterator[Trace]:
    from helpers.reading import Call, read

    calls: list[Call] = []

    def seen(record: GateRecord, qkv: tuple[Any, Any, Any]) -> None:
        calls.append(Call(record, tracer.order, tuple(tracer.origin(x) for x in qkv)))

    trace, error = Trace(), None
    try:
        with tracer.hooked(), watch(model, seen), shown:
            yield trace
    except Exception as raised:
        error = raised
        raise
    finally:
        found = read(type(model).__name__, tracer, calls, error, given)
        trace.xray = replace(found, parameters=parameter_dtypes(model))


def _look(
    model: Any,
    forward: Callable[..., Any],
    inputs: dict[str, Any],
    how: How,
    tracer: "Tracer",
    shown: Any,
    given: bool,
) -> "XRay":
    """The X-ray of one forward, whatever it raises."""
    with _region(model, how.autocast):
        kwargs = _prompt(model, inputs, how)
        notes: tuple[str, ...] = ()
        if how.decode:
            try:
                kwargs = _next(forward, inputs, kwargs)
            except Exception:  # it is raised again, where it is seen
                notes = ("This is the prompt's pass, which fails before a token is decoded.",)
        with contextlib.suppress(Exception), _traced(model, tracer, shown, given) as trace:
            forward(**kwargs)
    return replace(trace.xray, notes=(*notes, *trace.xray.notes))


def _tracer(
    model: Any,
    inputs: dict[str, Any],
    parameters: Iterable[tuple[str, Any]],
    buffers: Iterable[tuple[str, Any]],
) -> "Tracer":
    from helpers.tracer import Tracer, tensors_of

    return Tracer(
        model,
        *(("input", name, tensor) for name, tensor in tensors_of(inputs)),
        *(("parameter", name, tensor) for name, tensor in parameters),
        *(("buffer", name, tensor) for name, tensor in buffers),
    )


def _inputs(model: Any, how: How) -> tuple[dict[str, Any], bool]:
    """What the forward gets, on the model's device, and whether the caller has given it."""
    from helpers.examples import example_inputs

    if how.inputs is None and not hasattr(model, "config"):
        raise PlanError(
            f"{type(model).__name__} has no config that says what its forward gets: give inputs=, a"
            " dictionary of its arguments."
        )
    make = how.inputs if callable(how.inputs) else example_inputs
    given = how.inputs is not None and make is not how.inputs
    inputs = _named(how.inputs) if given else make(model)
    device = next((p.device for p in model.parameters()), "cpu")
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()}, given


def _named(inputs: Any) -> dict[str, Any]:
    """Inputs as keyword arguments of a forward."""
    if hasattr(inputs, "items"):  # a dictionary, or what a tokenizer returns
        return dict(inputs.items())
    if hasattr(inputs, "dtype"):
        return {"input_ids": inputs}
    raise PlanError(
        f"inputs={shortened(inputs)} is nothing that a forward gets: give token ids as a tensor, or"
        " a dictionary of its arguments."
    )


def _region(model: Any, autocast: str | None) -> Any:
    import torch

    if autocast is None:
        return contextlib.nullcontext()
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.autocast(device, dtype=getattr(torch, autocast))


def _prompt(model: Any, inputs: dict[str, Any], how: How) -> dict[str, Any]:
    """The arguments of the pass of the prompt."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(base.forward).parameters
    if how.cache is None:
        return {**inputs, **({"use_cache": False} if "use_cache" in takes else {})}
    if "past_key_values" not in takes:
        raise PlanError(f"{type(base).__name__} keeps no cache: leave out cache= and decode=.")
    first = {**inputs, "use_cache": True}
    if how.cache == "static":
        from transformers import StaticCache

        first["past_key_values"] = StaticCache(config=base.config, max_cache_len=64)
    return first


def _next(
    forward: Callable[..., Any], inputs: dict[str, Any], first: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of the pass of one more token, after the prompt's."""
    import torch

    with torch.no_grad():
        past = forward(**first).past_key_values
    one = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    token = torch.ones(len(inputs[one]), 1, dtype=torch.long)
    kept = {k: v for k, v in inputs.items() if "mask" not in k and "embeds" not in k}
    return {**kept, one: token, "use_cache": True, "past_key_values": past}


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Random state and buffers, which a forward may move, in training mode and otherwise."""
    import torch

    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    buffers = [
        (m, n, b, b.clone())
        for m in model.modules()
        for n, b in m._buffers.items()
        if b is not None
    ]
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer  # a forward may have put another one there
                buffer.copy_(content)
