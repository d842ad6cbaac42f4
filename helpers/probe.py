"""The gate: the dtypes of q, k and v on their way into the attention kernel.

Two places are watched. *Attention input* is what the model's attention module hands over.
*Kernel* is what FlashAttention receives after Transformers' own rescue, which casts a float32
query to the autocast dtype if autocast is on, else to the dtype of the module's first ``Linear``
(``get_target_dtype`` in transformers/integrations/flash_attention.py). FlashAttention decides on
the second.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import backend, state
from helpers.files import dtype_name

if TYPE_CHECKING:
    from torch.nn import Module


class Dtypes(NamedTuple):
    """The dtypes of one attention call, as ``"bfloat16"`` and the like."""

    q: str
    k: str
    v: str

    @classmethod
    def of(cls, q: Any, k: Any, v: Any) -> "Dtypes":
        """From three tensors or three ``torch.dtype``."""
        return cls(*(str(getattr(x, "dtype", x)).removeprefix("torch.") for x in (q, k, v)))

    def __str__(self) -> str:
        return self.q if len(set(self)) == 1 else f"q {self.q}, k {self.k}, v {self.v}"


@dataclass
class GateRecord:
    """The first attention call of one layer.

    ``kernel`` holds what the FlashAttention kernel received, and ``accepted`` whether it came back
    with a result instead of an exception. Both are None where no kernel was seen: sdpa, eager, or
    an error before. ``rescue`` says what decided the dtype of the rescue cast, where q was float32.
    """

    layer: str
    attention_input: Dtypes
    kernel: Dtypes | None = None
    accepted: bool | None = None
    rescue: str | None = field(default=None, compare=False)


def parameter_dtypes(model: Any) -> dict[str, int]:
    """The dtypes of a model's parameters with their number of tensors, most frequent first.

    Parameters are scanned because ``config.dtype`` keeps its old value after ``model.float()``.
    """
    counts = Counter(dtype_name(p.dtype) for p in model.parameters())
    return dict(counts.most_common())


@contextmanager
def watch(
    model: "Module", seen: Callable[[GateRecord, tuple[Any, Any, Any]], None] | None = None
) -> Iterator[list[GateRecord]]:
    """Record the dtypes at the gate of every layer while the model runs inside the block.

    The records appear in the order in which the layers are called. A call that enters the kernel
    past the attention functions, as modeling code of a checkpoint's own may, is a record under the
    name of that kernel. The attention functions that Transformers registered are put back
    afterwards, whatever happens inside; other threads are not recorded.

    Args:
        seen: is called with a record, q, k and v at every call, before the rescue; without it the
            first call of each layer is recorded and no other.

    Transformers 4 asks ``torch.is_autocast_enabled()`` before the rescue cast, which means CUDA, so
    a region of autocast on the CPU would not count as the same region on a GPU does. While it
    decides about CPU tensors, CUDA's autocast state is therefore the CPU's. Architectures of
    Transformers 4 with attention classes of their own ask elsewhere and are not reached, neither
    are peft's quantised layers.
    """
    names = {id(module): name for name, module in model.named_modules()}
    records: list[GateRecord] = []
    known: set[str] = set()
    calling: list[GateRecord | None] = []  # None: a call that is not recorded
    thread = threading.get_ident()

    def watched(registered: Callable[..., Any] | None) -> Callable[..., Any]:
        def attention(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            # None is "eager", which each modeling file defines for itself.
            function = registered or sys.modules[type(module).__module__].eager_attention_forward
            if threading.get_ident() != thread:
                return function(module, q, k, v, *args, **kwargs)
            layer = names.get(id(module), type(module).__name__)
            record = None
            if seen is not None or layer not in known:
                rescue = _rescue(module, q)
                record = GateRecord(layer, Dtypes.of(q, k, v), rescue=rescue)
                records.append(record)
                known.add(layer)
            if seen is not None and record is not None:
                seen(record, (q, k, v))
            calling.append(record)
            came_back = False
            try:
                with state.autocast_as_on_a_gpu(q.device.type):
                    result = function(module, q, k, v, *args, **kwargs)
                came_back = True
                return result
            finally:
                calling.pop()
                if record is not None and record.kernel is not None:
                    record.accepted = came_back

        return attention

    def kernel(name: str, q: Any, k: Any, v: Any) -> None:
        if threading.get_ident() != thread:
            return
        dtypes = Dtypes.of(q, k, v)
        if not calling:
            record = GateRecord(f"{name} {len(records)}", dtypes, dtypes)
            records.append(record)
            if seen is not None:
                seen(record, (q, k, v))
        elif calling[-1] is not None and calling[-1].kernel is None:
            calling[-1].kernel = dtypes

    found: list[GateRecord] = []
    with _registered(_implementations(model), watched), _kernel_calls(kernel):
        try:
            yield found
        finally:
            found.extend(records)


def _implementations(model: "Module") -> set[str]:
    """The names of the attention functions of a model; its parts may differ."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "_attn_implementation", None) for config in configs)
    return {name for name in names if isinstance(name, str)}


@contextmanager
def _registered(
    names: set[str], watched: Callable[[Callable[..., Any] | None], Callable[..., Any]]
) -> Iterator[None]:
    """Attention functions that are watched, under the names they have, for the block.

    Each is put where it was: a modeling file may have a registry of its own, which shares the
    global mapping.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    with state.one_at_a_time:
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name in names:
                is_local = name in registry._local_mapping
                mapping = registry._local_mapping if is_local else registry._global_mapping
                before.append((mapping, name, mapping.get(name)))
                mapping[name] = watched(mapping.get(name))
            yield
        finally:
            for mapping, name, function in before:
                if function is None:
                    del mapping[name]
                else:
                    mapping[name] = function


def _rescue(module: Any, q: Any) -> str | None:
    """What decides the dtype that Transformers casts a float32 query to, by its own rule:
    ``get_target_dtype`` in transformers/integrations/flash_attention.py of 5.22.2, and
    ``flash_attention_forward`` there in 4.57.6."""
    import torch

    if q.dtype != torch.float32 or "flash" not in str(module.config._attn_implementation):
        return None
    if torch.is_autocast_enabled(q.device.type):
        return f"autocast is on, to {dtype_name(torch.get_autocast_dtype(q.device.type))}"
    for name in ("_is_quantized", "_pre_quantization_dtype"):
        if hasattr(module.config, name):
            return f"the model is quantized, from {dtype_name(module.config.dtype)}"
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear):
            return f"the first Linear is {name}, with a {dtype_name(part.weight.dtype)} weight"
    return "the module has no Linear to take the dtype from"


@contextmanager
def _kernel_calls(callback: Callable[[str, Any, Any, Any], None]) -> Iterator[None]:
    """Call back with the kernel's name and q, k, v whenever a FlashAttention kernel is entered."""
    from helpers.reference_kernel import attention

    if backend.detect().name == "reference":

        def watcher(call: attention.GateCall) -> None:
            callback(call.entry, call.q, call.k, call.v)

        attention.watchers.append(watcher)
        try:
            yield
        finally:
            attention.watchers.remove(watcher)
    else:
        with native_calls(callback):
            yield


def native_calls(callback: Callable[[str, Any, Any, Any], None]) -> Any:
    """A context manager that sees flash-attn's own operators pass PyTorch's dispatcher.

    flash-attn 2.7 and later, and the prebuilt kernels, register their forward as a PyTorch operator
    whose first three arguments are q, k and v (flash_attn/flash_attn_interface.py).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "flash_attn" in func.namespace and len(args) >= 3:
                callback(func.__name__, *args[:3])
            return func(*args, **(kwargs or {}))

    return Mode()  # type: ignore[no-untyped-call]  # the base class has no types
