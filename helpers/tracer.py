"""Every operation of a forward pass: its dtypes, its module, and where a float32 came in.

A ``TorchDispatchMode`` sees the operations below autograd and autocast, so a cast that autocast
makes is one of them. Hooks on the model's own modules say whose forward is running. A float32 is
followed through the storages that hold it, back to the parameter, the input or the line it came
from.
"""

import linecache
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.files import dtype_name

WIDE = frozenset({torch.float32, torch.float64})  # what FlashAttention takes for no operand
CASTS = ("aten::_to_copy", "aten::to", "aten::type_as")  # the last two in inference mode
PASSED_OVER = tuple(f"{Path(f).parent}" for f in (torch.__file__, __file__))  # not a model's lines

Kind = Literal["parameter", "buffer", "input", "cast", "created"]


class Origin(NamedTuple):
    """Where a float32 came in.

    Attributes:
        order: the number of the operation, counted from the start of the forward pass.
        module: the path of the module whose forward ran it; "" is the model itself.
        operation: PyTorch's name of the operation, such as ``aten.mul.Tensor``.
        kind: what brought it: a float32 parameter or buffer, an input, a cast to float32, or an
            operation that makes float32 of nothing float32.
        name: of the parameter, buffer or input.
        line: the line of Python that ran the operation, with file and number.
        dtype: ``"float32"``, seldom ``"float64"``.
        function: the name of the Python function that the line is in.
    """

    order: int
    module: str
    operation: str
    kind: Kind
    name: str | None
    line: str
    dtype: str
    function: str

    def __str__(self) -> str:
        where = f"{self.module or 'the model itself'}, {self.operation}"
        what = {
            "parameter": f"the {self.dtype} parameter {self.name}",
            "buffer": f"the {self.dtype} buffer {self.name}",
            "input": f"the {self.dtype} input {self.name}",
            "cast": f"a cast to {self.dtype}",
            "created": f"the operation itself returns {self.dtype}",
        }[self.kind]
        return f"{where}: {what} ({self.line})"


class Operation(NamedTuple):
    """One operation: the module path, PyTorch's name, the dtypes of the tensors in and out, and the
    Python function and file that ran it."""

    module: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str
    file: str


class Refused(NamedTuple):
    """An operation that raised: the dtypes of its floating operands, and where the oldest float32
    among them came in. ``order`` counts operations."""

    order: int
    module: str
    operation: str
    operands: tuple[str, ...]
    origin: Origin | None
    error: Exception


class Returned(NamedTuple):
    """What a module's forward returned: the dtypes of its tensors. ``order`` counts operations."""

    order: int
    module: str
    kind: str
    dtypes: tuple[str, ...]


class Tracer:
    """Records the forward passes of one model in one thread.

    ``tensors`` are those that exist before the pass, with what they are and their names.
    """

    def __init__(self, model: torch.nn.Module, *tensors: tuple[Kind, str, torch.Tensor]) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.entered: list[tuple[int, str]] = []  # order and path
        self.returned: list[Returned] = []
        self.origins: list[Origin] = []
        self.joined: dict[Origin, Origin] = {}  # which older one they met
        # Column by column, and equal dtypes as one tuple: a new container for each operation would
        # set Python's garbage collector to work.
        self._modules: list[str] = []
        self._functions: list[Any] = []
        self._code: list[Any] = []
        self._dtypes: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
        self._same: dict[Any, Any] = {}
        self._stack = [""]
        self._left: str | None = None  # the innermost module that an exception is leaving
        self.refused: Refused | None = None
        self._thread = threading.get_ident()
        self._model = model
        # Storages from before the pass, and the places in them, since several may share one.
        self._known: dict[int, tuple[Kind, str]] = {}
        self._placed: dict[tuple[int, int], tuple[Kind, str]] = {}
        self._used: dict[tuple[int, int, str], Origin] = {}  # by which module
        self._born: dict[int, Origin] = {}  # storages of the pass
        # As long as somebody refers to a storage, if only weakly, no other one gets its address.
        self._reserved: dict[int, StorageWeakRef] = {}
        self.inputs = {name: dtype_name(t.dtype) for kind, name, t in tensors if kind == "input"}
        for kind, name, tensor in tensors:
            if tensor.dtype in WIDE:
                storage = _storage(tensor)
                self._known.setdefault(storage, (kind, name))
                self._placed.setdefault((storage, int(tensor.storage_offset())), (kind, name))

    @property
    def order(self) -> int:
        """How many operations there were so far."""
        return len(self._code)

    @property
    def module(self) -> str:
        """The path of the module whose forward is running, or was left by an exception."""
        return self._left or self._stack[-1]

    def operations(self, start: int = 0, stop: int | None = None) -> list[Operation]:
        """The operations so far, in order."""
        part = slice(start, stop)
        return [
            Operation(
                path, str(function), _names(ins), _names(outs), code.co_name, code.co_filename
            )
            for path, function, (ins, outs), code in zip(
                self._modules[part],
                self._functions[part],
                self._dtypes[part],
                self._code[part],
                strict=True,
            )
        ]

    def origin(self, tensor: torch.Tensor) -> Origin | None:
        """Where the float32 of a tensor came in; None for one that has none, or that is new."""
        return self._born.get(_storage(tensor)) if tensor.dtype in WIDE else None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow which module runs; afterwards the model has the hooks it had."""
        handles = []
        try:
            for module in self._model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                # Outermost, so that what the model's own hooks do belongs to its module.
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: torch.nn.Module, _args: Any) -> None:
        if threading.get_ident() == self._thread:
            path = self.paths[id(module)]
            self.entered.append((self.order, path))
            self._stack.append(path)
            self._left = None

    def _leave(self, module: torch.nn.Module, _args: Any, result: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        path = self.paths[id(module)]
        if result is None and sys.exc_info()[0] is not None:
            self._left = self._left or self._stack[-1]
        else:
            self._left = None
        while len(self._stack) > 1 and self._stack.pop() != path:
            pass
        if self._left is not None:
            return
        dtypes = tuple(dtype_name(t.dtype) for _, t in tensors_of({"": result}))
        self.returned.append(Returned(self.order, path, type(module).__name__, dtypes))

    def see(self, func: Any, args: Any, result: Any) -> None:
        """One operation that has run."""
        self._left = None  # whatever was raised before, somebody caught it
        frame = _caller()
        ins: list[Any] = []
        wide: list[torch.Tensor] = []
        for value in args:
            for item in value if type(value) is list else (value,):
                if isinstance(item, torch.Tensor):
                    ins.append(item.dtype)
                    if item.dtype in WIDE:
                        wide.append(item)
        outs: list[Any] = []
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                outs.append(item.dtype)
                if item.dtype in WIDE:
                    self._follow(func, item, wide, frame)
        dtypes = (tuple(ins), tuple(outs))
        self._dtypes.append(self._same.setdefault(dtypes, dtypes))
        self._modules.append(self._stack[-1])
        self._functions.append(func)
        self._code.append(frame.f_code)

    def fail(self, func: Any, args: Any, error: Exception) -> None:
        """One operation that was refused, and whose exception is on its way."""
        self._left = None
        frame = _caller()
        tensors = [
            item
            for value in args
            for item in (value if type(value) is list else (value,))
            if isinstance(item, torch.Tensor) and item.dtype.is_floating_point
        ]
        wide = [self._found(func, item, frame) for item in tensors if item.dtype in WIDE]
        self.refused = Refused(
            self.order,
            self.module,
            str(func),
            _names([item.dtype for item in tensors]),
            min(wide, key=_order, default=None),
            error,
        )

    def _found(self, func: Any, tensor: torch.Tensor, frame: Any) -> Origin:
        """Where the float32 of an operand came in."""
        storage = _storage(tensor)
        if storage in self._known and self._known[storage][0] != "input":
            # A weight comes in anew wherever it is used, because one use may be harmless.
            place = storage, int(tensor.storage_offset())
            use = (*place, self.module)
            if use not in self._used:
                kind, name = self._placed.get(place, self._known[storage])
                self._used[use] = self._new(func, kind, name, tensor, frame)
            return self._used[use]
        origin = self._born.get(storage)
        if origin is None:
            before: tuple[Kind, str | None] = ("input", "made before the forward pass")
            made = self._known.get(storage, before)
            if func._schema.name == "aten::lift_fresh":  # torch.tensor(...) and the like
                made = ("created", None)
            origin = self._new(func, *made, tensor, frame)
            self._give(tensor, origin)
        return origin

    def _give(self, tensor: torch.Tensor, origin: Origin) -> None:
        storage = _storage(tensor)
        self._born[storage] = origin
        if storage not in self._reserved:
            self._reserved[storage] = StorageWeakRef(tensor.untyped_storage())

    def _follow(
        self, func: Any, result: torch.Tensor, wide: list[torch.Tensor], frame: Any
    ) -> None:
        """Give a float32 result the oldest origin among its float32 operands."""
        # A tensor without dimensions promotes nothing that has some.
        operands = [tensor for tensor in wide if tensor.dim() or not result.dim()]
        found = [self._found(func, tensor, frame) for tensor in operands]
        oldest = min(found, key=_order, default=None)
        if oldest is None:
            kind: Kind = "cast" if func._schema.name in CASTS else "created"
            oldest = self._new(func, kind, None, result, frame)
        self.joined.update((origin, oldest) for origin in found if origin is not oldest)
        self._give(result, oldest)

    def _new(
        self, func: Any, kind: Kind, name: str | None, tensor: torch.Tensor, frame: Any
    ) -> Origin:
        dtype, function = dtype_name(tensor.dtype), frame.f_code.co_name
        origin = Origin(
            self.order, self.module, str(func), kind, name, _line(frame), dtype, function
        )
        self.origins.append(origin)
        return origin


class Watching(TorchDispatchMode):
    """Shows a tracer the operations on tensors that have data."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the base class has no types
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            self.tracer.fail(func, args, error)
            raise
        self.tracer.see(func, args, result)
        return result


def _caller() -> Any:
    """The innermost frame that is neither PyTorch's nor ours."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(PASSED_OVER) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _order(origin: Origin) -> int:
    return origin.order


def _line(frame: Any) -> str:
    return line_at(frame.f_code.co_filename, frame.f_lineno)


def line_at(file: str, number: int) -> str:
    """A line of Python, with its file and number."""
    return f"{_short(file)}:{number}: {linecache.getline(file, number).strip()}"


def _short(file: str) -> str:
    """A path without the folder that the packages are installed in; a notebook's cell as IPython
    calls it in a traceback, since its file has a name for this process only."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and (cell := shell.compile.format_code_name(file)):
        return " ".join(cell)
    return Path(file).as_posix().rpartition("site-packages/")[2]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _names(dtypes: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dtype_name(dtype) for dtype in dtypes)


def tensors_of(values: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors among values, also inside lists, tuples and dictionaries, with names."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if value.dtype.is_floating_point:
                yield name, value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors_of({name: item})
        elif isinstance(value, dict):
            yield from tensors_of(value)
