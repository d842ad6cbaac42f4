"""What the frames of an exception hold: tensors on the way to the kernel, the model, autocast.

Needs only the torch that raised it. A model is looked at as it is now, which is as it was when it
failed, unless somebody has changed it since.
"""

from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, Optional

FLOAT32, HALF = "float32", ("float16", "bfloat16")
MOST = 12  # variables of one frame
# Files below these hold the machinery of a call, and the kernel's own copies of q, k and v.
MACHINERY = ("/torch/nn/modules/", "/torch/_", "/torch/amp/", "/torch/autograd/", "/torch/utils/")
KERNELS = ("/flash_attn", "/flash-attn", "/torch-universal/", "reference_kernel")


V = ("value", "value_states", "v")  # what Transformers and the kernel call it


class Station(NamedTuple):
    """A tensor of a frame: the path of the module it is in, the function, its name, its dtype."""

    module: str
    function: str
    name: str
    dtype: str


class Seen(NamedTuple):
    """What the frames of an exception hold.

    Attributes:
        stations: the dtypes on the way, from the first frame to the last.
        model: the outermost module that was running; None if there is none.
        inner: the innermost one that has weights; None if there is none.
        module: its path in the model.
        parameters: dtypes of the model's floating parameters, by kind: "norm", "embedding",
            "adapter" and "other", each with how many there are.
        trains: whether a trainer's frame is there, or the model has been trained.
        evaluates: whether a frame of an evaluation or a callback is there.
        autocast: "on", "off", or "" where the frames do not tell.
        prepares: whether code of a frame calls prepare_model_for_kbit_training.
    """

    stations: "tuple[Station, ...]"
    model: Any = None
    inner: Any = None
    module: str = ""
    parameters: "dict[str, dict[str, int]]" = {}  # noqa: RUF012
    trains: bool = False
    evaluates: bool = False
    autocast: str = ""
    prepares: bool = False

    def dtype(self, *names: str) -> "Optional[str]":
        """The dtype of the last station of one of these names."""
        found = [one.dtype for one in self.stations if one.name in names]
        return found[-1] if found else None


def look(tb: "Optional[TracebackType]") -> Seen:
    """What the frames hold, from the first to the last."""
    import torch

    stations: list[Station] = []
    model, inner, names = None, None, {}
    owner, autocast, in_kernel = "", "", False
    trains = evaluates = prepares = False
    while tb is not None:
        frame, tb = tb.tb_frame, tb.tb_next
        code = frame.f_code
        mine = frame.f_locals.get("self")
        if isinstance(mine, torch.nn.Module):
            if model is None:
                model = mine
                names = {id(module): name for name, module in model.named_modules()}
            owner = names.get(id(mine), owner)
            inner = mine if next(mine.parameters(), None) is not None else inner
        function = code.co_name
        trains = trains or function in ("training_step", "_inner_training_loop")
        evaluates = evaluates or function.startswith("on_") or function in BESIDE
        prepares = prepares or _calls(code, PREPARE)
        autocast = _autocast(frame) or autocast
        file = code.co_filename.replace("\\", "/")
        if any(part in file for part in MACHINERY) or in_kernel:
            continue
        in_kernel = any(part in file for part in KERNELS)
        stations += list(_stations(frame, owner))
    if _rescued_to(stations) == FLOAT32:
        autocast = autocast or "off"  # the rescue takes autocast's dtype where autocast is on
    if model is not None:  # what was trained has gradients, also in eval mode
        trains = trains or model.training or any(p.grad is not None for p in model.parameters())
    parameters = parameters_by_kind(model)
    return Seen(
        tuple(stations), model, inner, owner, parameters, trains, evaluates, autocast, prepares
    )


BESIDE = ("evaluate", "evaluation_loop", "prediction_step", "validation_step", "compute_metrics")
PREPARE = "prepare_model_for_kbit_training"


def _autocast(frame: FrameType) -> str:
    """What a frame of autocast's wrapper says; "" of all others."""
    if frame.f_code.co_name != "decorate_autocast":
        return ""
    instance = frame.f_locals.get("autocast_instance")
    return "on" if getattr(instance, "_enabled", True) else "off"


def _stations(frame: FrameType, owner: str) -> Iterator[Station]:
    """The floating tensors among a frame's variables, and the dtype that the rescue aims at."""
    import torch

    code = frame.f_code
    wanted = _used(code) if code.co_name == "<module>" else None
    count = 0
    for name, value in list(frame.f_locals.items()):
        if wanted is not None and name not in wanted:
            continue  # what lies about in a notebook was not on the way
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif name != "target_dtype":
            continue
        if isinstance(value, torch.dtype) and value.is_floating_point and count < MOST:
            count += 1
            yield Station(owner, code.co_name, name, str(value).partition(".")[2])


def _calls(code: CodeType, name: str) -> bool:
    """Whether code uses a name, and does not only import it."""
    if name not in code.co_names:
        return False
    import dis

    return any(
        step.argval == name and step.opname.startswith("LOAD_")
        for step in dis.get_instructions(code)
    )


def _used(code: CodeType) -> "set[str]":
    return {*code.co_names, *code.co_varnames}


def _rescued_to(stations: "list[Station]") -> "Optional[str]":
    return next((one.dtype for one in stations if one.name == "target_dtype"), None)


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
    if is_adapter([name]):
        return "adapter"
    if "norm" in low or "ln_" in low or (parameter.dim() == 1 and low.endswith(".weight")):
        return "norm"
    return "embedding" if "embed" in low or "lm_head" in low else "other"


def is_adapter(names: "list[str]") -> bool:
    return any("lora" in name.lower() or "adapter" in name.lower() for name in names)


def asked(attention: Any, dtype: str) -> "dict[str, str]":
    """What each child of an attention makes of one token of zeros of this dtype.

    The modules themselves are asked, in eval mode and without gradients, because their weights do
    not tell: PEFT casts back what its float32 adapters return, and others do not. Those that take
    something else than one tensor are left out.

    Returns:
        Names of children and dtypes of what they return, "float32" or "bfloat16" for example.
    """
    import torch

    found: dict[str, str] = {}
    for name, child in attention.named_children():
        weight = next(child.parameters(), None)
        width = _width(child)
        if weight is None or width is None or weight.device.type == "meta":
            continue
        modes = [(module, module.training) for module in child.modules()]
        child.eval()
        try:
            with torch.no_grad():
                zeros = torch.zeros(1, 1, width, dtype=getattr(torch, dtype), device=weight.device)
                made = child.forward(zeros)
            found[name] = str(made.dtype).partition(".")[2]
        except Exception:  # a shape of its own, no memory, a GPU that is gone: it cannot be asked
            continue
        finally:
            for module, mode in modes:
                module.training = mode
    return found


def _width(child: Any) -> "Optional[int]":
    """How many features a module takes."""
    for module in child.modules():
        width = getattr(module, "in_features", None)
        if isinstance(width, int):
            return width
    weight = getattr(child, "weight", None)
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


def is_quantised(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def declared(model: Any) -> "Optional[str]":
    """The dtype that a model's config names, which no later cast changes."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return str(dtype).rpartition(".")[2] if dtype is not None else None
