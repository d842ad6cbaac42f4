"""The gate: the dtypes of q, k and v on their way into the attention kernel.

Two places are watched. *Attention input* is what the model's attention module hands over.
*Kernel* is what FlashAttention receives after Transformers' own rescue, which casts a float32
query to the autocast dtype if autocast is on, else to the dtype of the module's first ``Linear``
(``get_target_dtype`` in transformers/integrations/flash_attention.py). FlashAttention decides on
the second.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import backend, state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    an error before.
    """

    layer: str
    attention_input: Dtypes
    kernel: Dtypes | None = None
    accepted: bool | None = None


@contextmanager
def watch(model: "PreTrainedModel") -> Iterator[list[GateRecord]]:
    """Record the dtypes at the gate of every layer while the model runs inside the block.

    The records appear in the order in which the layers are called. The attention function that
    Transformers registered is put back afterwards, whatever happens inside.

    Transformers 4 asks ``torch.is_autocast_enabled()`` before the rescue cast, which means CUDA, so
    a region of autocast on the CPU would not count as the same region on a GPU does. While it
    decides about CPU tensors, CUDA's autocast state is therefore the CPU's. Architectures of
    Transformers 4 with attention classes of their own ask elsewhere and are not reached, neither
    are peft's quantised layers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    names = {id(module): name for name, module in model.named_modules()}
    records: dict[str, GateRecord] = {}
    calling: list[GateRecord] = []

    def attention(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        layer = names.get(id(module), type(module).__name__)
        record = records.setdefault(layer, GateRecord(layer, Dtypes.of(q, k, v)))
        calling.append(record)
        came_back = False
        try:
            function = registered or sys.modules[type(module).__module__].eager_attention_forward
            with state.autocast_as_on_a_gpu(q.device.type):
                result = function(module, q, k, v, *args, **kwargs)
            came_back = True
            return result
        finally:
            calling.pop()
            if record.kernel is not None and record.accepted is None:
                record.accepted = came_back

    def kernel(q: Any, k: Any, v: Any) -> None:
        if calling and calling[-1].kernel is None:
            calling[-1].kernel = Dtypes.of(q, k, v)

    name = model.config._attn_implementation
    registered = registry.get(name)  # None for "eager", which each modeling file defines for itself
    seen: list[GateRecord] = []
    local = dict(registry._local_mapping)
    registry[name] = attention
    try:
        with _kernel_calls(kernel):
            yield seen
    finally:
        registry._local_mapping.clear()
        registry._local_mapping.update(local)
        seen.extend(records.values())


@contextmanager
def _kernel_calls(callback: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Call back with q, k, v (or their dtypes) whenever a FlashAttention kernel is entered."""
    from helpers.reference_kernel import attention

    if backend.detect().name == "reference":

        def watcher(call: attention.GateCall) -> None:
            callback(call.q, call.k, call.v)

        attention.watchers.append(watcher)
        try:
            yield
        finally:
            attention.watchers.remove(watcher)
    else:
        with native_calls(callback):
            yield


def native_calls(callback: Callable[[Any, Any, Any], None]) -> Any:
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
                callback(*args[:3])
            return func(*args, **(kwargs or {}))

    return Mode()  # type: ignore[no-untyped-call]  # the base class has no types
