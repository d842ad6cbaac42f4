"""A LoRA adapter's folder: what it says, and whether it fits a base.

An adapter holds two small matrices, lora_A of shape (r, in) and lora_B of shape (out, r), for each
module that it changes in a base. It names the base and does not contain it.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import PlanError
from helpers.files import (
    Tensor,
    dtype_name,
    first_sentence,
    header,
    json_object,
    local_folder,
    shortened,
)

if TYPE_CHECKING:
    from peft import PeftModel

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_SAVED = "the folder that save_pretrained of a PeftModel wrote"
FITTING = "load the base that it was trained on, and give the whole folder of the adapter"
UNQUANTISED = "load the base in bfloat16 without quantization, attach the adapter, and merge that"


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder says.

    Attributes:
        folder: where it is.
        base: the model that it was trained on, a folder or a hub id; None where it names none.
        peft_type: "LORA", also for a DoRA.
        r: the rank, the inner size of the two matrices.
        use_dora: whether it is a DoRA.
        target_modules: ends of the names of the changed modules, or one regular expression.
        tensors: dtype and shape by name.
    """

    folder: Path
    base: str | None
    peft_type: str
    r: int
    use_dora: bool
    target_modules: tuple[str, ...] | str
    tensors: Mapping[str, Tensor]


def read(folder: str | os.PathLike[str]) -> Adapter:
    """What an adapter's folder says; no tensor is loaded.

    Raises:
        PlanError: it is not the folder of a LoRA adapter, or a file of it is damaged.
    """
    path = Path(os.path.expanduser(folder))  # noqa: PTH111  # Path.expanduser raises on "~nobody"
    given = _settings(path)
    if (kind := given.get("peft_type")) != "LORA":
        raise PlanError(
            f"The adapter in {str(path)!r} is of the type {shortened(kind)} and not 'LORA': give"
            f" {_SAVED} with a LoraConfig."
        )
    base, r, targets = map(given.get, ("base_model_name_or_path", "r", "target_modules"))
    dora = given.get("use_dora", False)
    for key, good, expected in (
        ("base_model_name_or_path", base is None or isinstance(base, str), "a name"),
        ("r", type(r) is int and r > 0, "a whole number from 1 on"),
        ("target_modules", targets is None or _is_names(targets), "a name or a list of names"),
        ("use_dora", isinstance(dora, bool), "true or false"),
    ):
        if not good:
            raise PlanError(
                f"{str(path / SETTINGS)!r} has {shortened(given.get(key))} for {key!r}, expected"
                f" {expected}: save the adapter again with save_pretrained."
            )
    names = targets if isinstance(targets, str) else tuple(targets or ())
    return Adapter(path, base or None, "LORA", int(r or 0), dora, names, _lora_tensors(path))


def base_of(folder: str | os.PathLike[str]) -> str:
    """The folder of the model that an adapter was trained on: the one that it names, or the
    snapshot of a hub id in the Hugging Face cache. The network is not asked.

    Raises:
        PlanError: there is no such model here, or ``folder`` is not an adapter's (``read``).
    """
    adapter = read(folder)
    if adapter.base is None:
        raise PlanError(
            f"The adapter {str(adapter.folder)!r} names no base: attach it to the model that it was"
            " trained on."
        )
    if (found := local_folder(adapter.base)) is None:
        raise PlanError(
            f"The base {adapter.base!r} of the adapter {str(adapter.folder)!r} is not here, neither"
            " as a folder with config.json and weights nor in the Hugging Face cache: copy or"
            " download it, or attach the adapter to a copy that you have."
        )
    return str(found)


def attach(
    model: Any, folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> "PeftModel":
    """``PeftModel.from_pretrained(model, folder)``, after a look at whether the two fit.

    peft itself changes the model and then lists every tensor of a wrong shape; it warns of missing
    tensors and attaches untrained ones in their place; it drops those of other layers in silence.

    Args:
        base: what messages call the model; default is the name that it was loaded by.

    Raises:
        PlanError: the adapter cannot be read, was trained on another architecture or on other
            sizes, or the model has an adapter already. The model is then as before.
    """
    import torch
    from peft import PeftModel

    adapter = read(folder)
    name = os.fspath(base) if base is not None else name_of(model)
    what = f"adapter {str(adapter.folder)!r} of the base {adapter.base!r}"
    if _has_adapter(model):
        raise PlanError(
            f"The model {name!r} has an adapter already: load the model again, or call"
            " load_adapter() of the PeftModel."
        )
    if problem := misfit(adapter, peft_config(adapter.folder), model):
        raise PlanError(
            f"The {what} does not fit the model {name!r}, because {problem}: {FITTING}."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(devices=[]):
            return PeftModel.from_pretrained(model, str(adapter.folder))
    except Exception as error:
        _detach(model)
        for parameter, before in trainable:
            parameter.requires_grad = before
        raise PlanError(
            f"peft cannot attach the {what} to the model {name!r} ({first_sentence(error)}):"
            f" {FITTING}."
        ) from error


def refuse_merge(model: Any) -> None:
    """Raise where ``merge_and_unload`` would add the adapter's product to quantised weights.

    Raises:
        PlanError: the base is quantised. peft merges into some such bases without a word, and the
            sum is rounded to their few bits.
    """
    if how := quantised(model):
        raise PlanError(
            f"The base of this adapter is quantised ({how}) and a merge would be rounded to its few"
            f" bits: {UNQUANTISED}."
        )


# The folder.


def _settings(folder: Path) -> dict[str, Any]:
    if not os.path.isdir(folder):  # noqa: PTH112  # Path.is_dir raises on names that none can have
        raise PlanError(f"There is no folder {str(folder)!r}: give {_SAVED}.")
    if (file := folder / SETTINGS).is_file():
        return json_object(file)
    if (folder / "config.json").is_file():
        raise PlanError(
            f"The folder {str(folder)!r} holds a whole model and no adapter: load it with"
            f" from_pretrained, or give {_SAVED}."
        )
    raise PlanError(
        f"The folder {str(folder)!r} has no {SETTINGS}, so it is not an adapter: give {_SAVED}."
    )


def _lora_tensors(folder: Path) -> dict[str, Tensor]:
    if (file := folder / WEIGHTS).is_file():
        tensors = header(file)
        if any(".lora_" in name for name in tensors):
            return tensors
        raise PlanError(f"{str(file)!r} holds no tensor of a LoRA: give {_SAVED}.")
    if (folder / PICKLE).is_file():
        raise PlanError(
            f"The adapter {str(folder)!r} has its weights in {PICKLE}, a pickle, which can run code"
            " and is not opened here: if you trust it, attach it with peft and save it again, which"
            f" writes {WEIGHTS}."
        )
    raise PlanError(
        f"The folder {str(folder)!r} has an {SETTINGS} and no weights: put {WEIGHTS} beside it, or"
        f" give {_SAVED}."
    )


def _is_names(value: Any) -> bool:
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return listed or isinstance(value, str)


# The fit.


def misfit(adapter: Adapter, config: Any, model: Any) -> str:
    """The first thing in which an adapter does not fit a model; empty where it does."""
    try:
        return _first_misfit(adapter, config, model)
    except Exception as error:  # settings of a wrong type, which peft takes until it needs them
        raise _unreadable(adapter.folder, error) from error


def _first_misfit(adapter: Adapter, config: Any, model: Any) -> str:
    """Only linear maps are judged, and the rest is left to peft; so are models whose modules peft
    renames or repeats before it looks for them, and targets that peft chooses."""
    from peft.tuners.tuners_utils import check_target_module_exists

    inner = unwrapped(model)
    if getattr(inner, "_checkpoint_conversion_mapping", None) or config.layer_replication:
        return ""
    modules = dict(own_modules(inner))
    pairs = _pairs(adapter.tensors)
    for name, pair in pairs.items():
        if name not in modules:
            return f"the model has no module {name!r}"
        if (size := linear_size(modules[name])) is None:
            continue
        a, b = pair.get("A", ()), pair.get("B", ())
        if not len(a) == len(b) == 2:
            return f"the adapter has no matrices lora_A and lora_B for {name!r}"
        if (trained := (b[0], a[1])) != size:
            return f"{name!r} is (out, in) = {size} in the model and {trained} in the adapter"
        if {a[0], b[1]} - {config.r, *config.rank_pattern.values()}:
            return f"{name!r} has the rank {a[0]} in {WEIGHTS} and {config.r} in {SETTINGS}"
    for name, module in modules.items() if config.target_modules else ():
        if name not in pairs and linear_size(module) and check_target_module_exists(config, name):
            return f"the adapter has no tensors for the module {name!r} of the model"
    return ""


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of lora_A and lora_B, as "A" and "B", by module."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name):
            found.setdefault(match[1], {})[match[2]] = tensor.shape
    return found


def own_modules(inner: Any) -> Iterator[tuple[str, Any]]:
    """A model's modules under the names that they have without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: tuple[str, ...] = ()
    for name, module in inner.named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            yield name, module.get_base_layer()
        else:
            yield name, module


def linear_size(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear map; None for other modules."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):  # GPT-2's linear map, whose weight is transposed
        return module.weight.shape[1], module.weight.shape[0]
    return (module.out_features, module.in_features) if isinstance(module, Linear) else None


def peft_config(folder: Path) -> Any:
    """peft's own reading, with its defaults and without what only newer versions know."""
    from peft import LoraConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns again when it attaches
            return LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> PlanError:
    return PlanError(
        f"peft cannot use {str(folder / SETTINGS)!r} ({first_sentence(error)}): save the adapter"
        " again with save_pretrained."
    )


def _detach(model: Any) -> None:
    """Put the modules back that a failed ``PeftModel.from_pretrained`` has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in reversed(list(model.named_modules())):  # inner first, while the names hold
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
    vars(model).pop("peft_config", None)


def _has_adapter(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def unwrapped(model: Any) -> Any:
    """The model inside a PeftModel, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def name_of(model: Any) -> str:
    """The name that a live model was loaded by, or its class."""
    config = getattr(unwrapped(model), "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)


def quantised(model: Any) -> str:
    """How a live model is quantised; empty where it is not.

    Transformers sets ``is_quantized`` and the config's ``quantization_config``, and takes both back
    when it dequantises. What somebody quantised by hand shows in the dtype of its weights.
    """
    base = unwrapped(model)
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is not None or getattr(base, "is_quantized", False):
        return quantisation(config)
    narrow = [p.dtype for p in base.parameters() if not p.is_floating_point() or p.itemsize < 2]
    return f"weights in {dtype_name(narrow[0])}" if narrow else ""


def quantisation(config: Any) -> str:
    """The method that a ``quantization_config`` names, from config.json or live."""
    given = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    method = given.get("quant_method")
    return str(getattr(method, "value", method) or "by an unnamed method")
