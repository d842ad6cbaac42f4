"""Do training and inference use one dtype? A checklist for a pair of adapter and base.

An adapter stores the dtype of its own tensors, but not the one that the base computed in while it
was trained.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import checkpoints, state
from helpers.adapter import (
    FITTING,
    UNQUANTISED,
    Adapter,
    linear_size,
    misfit,
    name_of,
    own_modules,
    peft_config,
    quantisation,
    quantised,
    read,
    unwrapped,
)
from helpers.errors import PlanError
from helpers.files import (
    CODES,
    Tensor,
    declared_dtype,
    dtype_name,
    first_sentence,
    json_object,
    local_folder,
    shortened,
    tensors,
)
from helpers.plan import DTYPES, HALF

if TYPE_CHECKING:
    from packaging.version import Version

# From here on an omitted dtype is "auto" (huggingface/transformers#42805).
OMITTED_IS_AUTO = "5.0.0rc1"


class Line(NamedTuple):
    """One line of a Checklist. ``ok`` is None where it cannot be known from what was given; ``fix``
    says what to do where it is not True."""

    name: str
    found: str
    ok: bool | None = True
    fix: str = ""

    def __str__(self) -> str:
        mark = {True: "OK", False: "FAIL", None: "?"}[self.ok]
        head = f"[{mark}] {self.name}: {self.found}"
        return head if self.ok else f"{head}\n       fix: {self.fix}"


@dataclass(frozen=True, repr=False)
class Checklist:
    """What ``same_dtype`` found, line by line; a line is also to be had by its name.

    Attributes:
        loads: the dtype of the base's linear layers at inference, as ``"bfloat16"``; None where it
            is unknown, or where they have several.
        computes: the dtype of their matrix products at inference, likewise.
    """

    lines: tuple[Line, ...]
    loads: str | None
    computes: str | None

    @property
    def ok(self) -> bool:
        """Every line is [OK]; what is unknown is not."""
        return all(line.ok is True for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        return {line.name: line for line in self.lines}[name]

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))

    __repr__ = __str__


def same_dtype(
    adapter: Any,
    base: Any,
    *,
    trained_in: Any = None,
    dtype: Any = "omitted",
    autocast: Any = None,
    transformers_version: str | None = None,
) -> Checklist:
    """Do training and inference use one dtype? A checklist for an adapter and a base.

    Args:
        adapter: an adapter's folder, or a live PeftModel.
        base: a checkpoint's folder, a name from ``checkpoints.available()``, a hub id in the cache,
            or a live model, whose dtypes are then measured and not predicted.
        trained_in: the dtype in which the base's matrix products ran during training: that of its
            weights, or autocast's (``bf16=True`` or ``fp16=True`` in TrainingArguments). An adapter
            does not store it, and a Trainer only in training_args.bin, a pickle.
        dtype: the ``dtype=`` argument of ``from_pretrained`` at inference; ``"omitted"`` leaves it
            out.
        autocast: the dtype of the ``torch.autocast`` region around inference, or None.
        transformers_version: what loads at inference; default is the installed version.

    How Transformers picks the dtype: an omitted one is torch's default before 5.0, and ``"auto"``
    since; ``"auto"`` is what config.json says, else the dtype of the first floating-point tensor
    (``_get_dtype`` in transformers/modeling_utils.py of 4.57.6 and 5.22.2).

    Raises:
        PlanError: an argument has a value that is not known, a file cannot be read, or there is no
            such base here.
    """
    trained_in = _known("trained_in", trained_in, (None, *HALF, "float32"))
    dtype = _known("dtype", dtype, DTYPES)
    autocast = _known("autocast", autocast, (None, *HALF))
    version = _version(transformers_version)
    weights = _measured(base) if _is_model(base) else _stored(base)
    loaded = _arrives(weights, dtype, version)
    loads = loaded[0] if len(loaded) == 1 else None
    computes = None if weights.quantised else autocast or loads
    lines = (
        *_of_the_adapter(adapter, weights),
        _tensors(weights, autocast),
        _load(weights, dtype, version),
        _inference(weights, loaded, autocast, trained_in),
        _parity(computes, trained_in),
        _merge(weights, loads, computes),
    )
    return Checklist(lines, loads, computes)


# The checklist.


class _Weights(NamedTuple):
    """A base's weights, on file or live.

    ``tensors`` has their dtypes with counts, ``linear`` those of a live model's linear layers, and
    ``auto`` what ``dtype="auto"`` makes of a file; ``declared`` is config.json's word.
    """

    name: str
    tensors: dict[str, int]
    quantised: str
    model: Any = None
    linear: tuple[str, ...] = ()
    folder: Path = Path()
    declared: str | None = None
    auto: str | None = None


def _measured(model: Any) -> _Weights:
    modules = [module for _, module in own_modules(unwrapped(model))]
    own = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    linear = _counted(module.weight.dtype for module in modules if linear_size(module))
    tensors = _counted(p.dtype for p in own.values())
    return _Weights(name_of(model), tensors, quantised(model), model, tuple(linear))


def _stored(base: Any) -> _Weights:
    name = os.path.expanduser(os.fspath(base))  # noqa: PTH111  # a Path turns a hub id's slash
    folder = checkpoints.get(name) if name in checkpoints.available() else local_folder(name)
    if folder is None:
        known = ", ".join(map(repr, checkpoints.available()))
        raise PlanError(
            f"The base {name!r} is not here: give the folder of a model with config.json and"
            f" weights, one of {known}, or a hub id that is in the Hugging Face cache."
        )
    config = json_object(folder / "config.json")
    quantization = config.get("quantization_config")
    declared = declared_dtype(folder)
    dtypes = [tensor.dtype for tensor in tensors(folder)]
    first = next((dtype for dtype in dtypes if dtype in CODES.values()), None)
    return _Weights(
        name,
        _counted(dtypes),
        "" if quantization is None else quantisation(quantization),
        folder=folder,
        declared=declared,
        auto=declared or first,
    )


def _arrives(weights: _Weights, dtype: str, version: "Version") -> tuple[str, ...]:
    """The dtypes of the linear layers; those of a file are one, or unknown and none."""
    import torch
    from packaging.version import Version

    if weights.quantised:
        return ()
    if weights.model is not None:
        return weights.linear
    if dtype == "omitted" and version < Version(OMITTED_IS_AUTO):
        return (dtype_name(torch.get_default_dtype()),)
    found = weights.auto if dtype in ("omitted", "auto") else dtype
    return (found,) if found else ()


def _of_the_adapter(adapter: Any, weights: _Weights) -> Iterator[Line]:
    live = _is_model(adapter)
    if live:
        trained, config = _live_adapter(adapter)
    else:
        trained = read(adapter)
        config = peft_config(trained.folder)
    yield _fit(trained, config, weights)
    dtypes = _counted(tensor.dtype for tensor in trained.tensors.values())
    cast = "" if live or set(dtypes) == {"float32"} else ", attached as float32"
    yield Line("adapter's tensors", _listed(dtypes) + cast)


def _fit(adapter: Adapter, config: Any, weights: _Weights) -> Line:
    name = "adapter fits base"
    named = "a base without a name" if adapter.base is None else _brief(adapter.base)
    pair = f"the base is {_brief(weights.name)}, and the adapter was trained on {named}"
    try:
        model = weights.model if weights.model is not None else _skeleton(weights.folder)
    except Exception as error:  # code of its own, a newer architecture, no causal language model
        reason = f"unknown, {weights.name!r} cannot be built ({first_sentence(error)})"
        return Line(name, reason, None, "give the model itself")
    if problem := misfit(adapter, config, model):
        return Line(name, f"no, {problem}; {pair}", False, FITTING)
    return Line(name, f"in every shape; {pair}")


def _tensors(weights: _Weights, autocast: str | None) -> Line:
    name, listed = "base's tensors", _listed(weights.tensors)
    if weights.model is None:
        said = f"config.json says {weights.declared or 'nothing'}"
        if weights.tensors:
            return Line(name, f"{listed} on file; {said}")
        return Line(name, f"unknown, no model.safetensors; {said}", None, "save the base again")
    if len(weights.tensors) == 1 or autocast or weights.quantised:
        return Line(name, f"{listed}, measured")
    return Line(
        name,
        f"{listed}, measured, and a matrix product takes one dtype",
        None,
        "give it one dtype with model.to(), or run it to see whether the model casts for itself",
    )


def _load(weights: _Weights, dtype: str, version: "Version") -> Line:
    from packaging.version import Version

    if weights.quantised:
        return Line("load", f"quantised ({weights.quantised})")
    if weights.model is not None:
        return Line("load", f"done, {_joined(weights.linear)} in the linear layers")
    four, five = (_joined(_arrives(weights, dtype, Version(v))) for v in ("4", "5"))
    argument = "without dtype" if dtype == "omitted" else f"dtype={dtype!r}"
    found = f"{argument}: {four} with Transformers 4, {five} with 5 (this is {version})"
    known = _arrives(weights, dtype, version)
    return Line("load", found, True if known else None, "say it: dtype=torch.bfloat16")


def _inference(
    weights: _Weights, loaded: tuple[str, ...], autocast: str | None, trained_in: str | None
) -> Line:
    name, half = "inference computes in", trained_in if trained_in in HALF else HALF[0]
    cast = f"load with dtype=torch.{half}" if weights.model is None else f"model.to(torch.{half})"
    if weights.quantised or not (autocast or loaded):
        return Line(name, "unknown", None, "run the model and look at what a linear layer returns")
    if autocast:
        return Line(name, f"{autocast}, by autocast over {_joined(loaded) or 'unknown'} weights")
    if len(loaded) > 1:
        return Line(name, f"{_joined(loaded)}, by layer", False, cast)
    if loaded[0] in HALF:
        return Line(name, f"{loaded[0]}, as the weights are")
    refused = f"{loaded[0]}, which FlashAttention refuses"
    return Line(name, refused, False, f'{cast}, or use attn_implementation="sdpa"')


def _parity(computes: str | None, trained_in: str | None) -> Line:
    name = "same as in training"
    if trained_in is None:
        wanted = "pass trained_in=, the dtype of the base, or of autocast, while it was trained"
        return Line(name, "unknown, as an adapter does not store it", None, wanted)
    if computes is None:
        return Line(name, f"unknown; trained in {trained_in}", None, "see the line above")
    if computes == trained_in:
        return Line(name, f"yes, {trained_in}")
    overflow = ", and values above 65504 overflow" if computes == "float16" else ""
    found = f"no, trained in {trained_in} and computing in {computes}: the logits move{overflow}"
    sdpa = "" if trained_in in HALF else ' with attn_implementation="sdpa"'
    return Line(name, found, False, f"run inference in {trained_in}{sdpa}")


def _merge(weights: _Weights, loads: str | None, computes: str | None) -> Line:
    name = "merging"
    if weights.quantised:
        return Line(name, f"rounded to the few bits of {weights.quantised}", False, UNQUANTISED)
    if loads is None:
        return Line(name, "unknown", None, "see the lines above")
    keeps = f'keeps {loads}, which "auto" then loads'
    if loads == computes and loads in HALF:
        return Line(name, keeps)
    if loads == computes:
        refused = f"{keeps}, and FlashAttention refuses it"
        return Line(name, refused, False, "save the merged model in bfloat16")
    fix = f"load the base with dtype=torch.{computes} before you merge"
    return Line(name, f"{keeps}, and inference without autocast computes in it", False, fix)


def _live_adapter(model: Any) -> tuple[Adapter, Any]:
    """A PeftModel's active adapter as ``save_pretrained`` would write it, and its LoraConfig."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    active = model.active_adapter if isinstance(model, PeftModel) else ""
    config = model.peft_config[active] if active else None
    if not isinstance(config, LoraConfig):
        raise PlanError(
            f"The adapter is a {type(model).__name__} without a LoRA: give a PeftModel made with a"
            " LoraConfig, or the folder of an adapter."
        )
    # With "auto" peft asks the hub whether the base's embedding has grown.
    saved = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    tensors = {n: Tensor(dtype_name(t.dtype), tuple(t.shape)) for n, t in saved.items()}
    return Adapter(Path(), name_of(model), "LORA", config.r, config.use_dora, (), tensors), config


def _skeleton(folder: Path) -> Any:
    """A checkpoint's modules with their shapes and without data."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with state.listening(), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        # config.json may ask for a FlashAttention that is not installed here.
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )


def _brief(name: str) -> str:
    """The end of a path, and any other name as it is."""
    return repr(Path(name).name if os.path.isabs(name) else name)  # noqa: PTH117


def _is_model(value: Any) -> bool:
    return hasattr(value, "named_modules")


def _known(name: str, value: Any, choices: tuple[str | None, ...]) -> Any:
    found = None if value is None else dtype_name(value)
    if found not in choices:
        known = ", ".join(map(repr, choices))
        raise PlanError(f"{name}={shortened(value)} is not known: use one of {known}.")
    return found


def _version(given: str | None) -> "Version":
    from packaging.version import InvalidVersion, Version

    try:
        return Version(given or installed("transformers"))
    except (InvalidVersion, TypeError) as error:
        raise PlanError(
            f"transformers_version={shortened(given)} is not a version: give one like '4.57.6'."
        ) from error


def _counted(dtypes: Iterable[Any]) -> dict[str, int]:
    return dict(Counter(map(dtype_name, dtypes)).most_common())


def _listed(dtypes: dict[str, int]) -> str:
    return ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.items())


def _joined(dtypes: Iterable[str]) -> str:
    return " and ".join(dtypes) or "unknown"
