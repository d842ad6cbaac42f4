"""A model at its own size without its weights: real code on tensors that have no data.

Floating tensors are PyTorch's fake tensors: a shape, a dtype, a device (the CPU), and no memory.
Integers and booleans are real, because models read them: masks, positions, sequence lengths, image
grids. Where numbers that nobody has would decide, a stated assumption does (``ASSUMED``); where
none covers it, PyTorch refuses and names the operation.

Fake tensors do not compare the dtypes of the operands of a matmul as real ones do. Here the real
operation is asked, on a few zeros of the same dtypes, and what it raises is raised.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from helpers.tracer import Tracer

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
FACTORIES = frozenset(
    {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "normal"}
)
FILLS = frozenset({"normal_", "uniform_", "random_", "bernoulli_", "zero_", "fill_"})
ASSUMED = (
    "A choice among the largest values (topk, sort, argmax) takes the first ones, no value is inf"
    " or NaN, and of tests of unknown numbers any() is False and all() is True; where the dtypes"
    " depend on such numbers, the real model can do something else."
)
GROUPED = torch.ops.aten._grouped_mm.default
READ = 2**20  # elements; larger ones made of integers, such as rotary tables, no model reads
ENOUGH = 2**22  # elements that an operation may have to be asked at its own shapes


class Weightless(FakeTensorMode):
    """Inside, new floating tensors have no data, and mixed dtypes are refused as real ones are.

    It is a kind of FakeTensorMode and not one more mode beside it, because each mode on the stack
    costs every operation another way through PyTorch's dispatcher.
    """

    tracer: Tracer | None = None  # is shown what runs
    assumed = False  # something that numbers decide: see ASSUMED
    inside = False  # an operation; what PyTorch does to find its result is no operation

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # PyTorch's memory of conversions holds weak references to parameters, with which
        # ``Module.to()`` cannot change their dtype; ``known`` remembers what is needed.
        self.memo = self.fake_tensor_converter.meta_converter.tensor_memo
        self.refusals: dict[Any, Exception | None] = {}
        self.known: dict[Any, tuple[torch.Tensor, FakeTensor]] = {}

    @contextmanager
    def shown_to(self, tracer: Tracer) -> Iterator[None]:
        """A tracer sees the operations of the block."""
        self.tracer = tracer
        try:
            yield
        finally:
            self.tracer = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        trait = _TRAITS.get(func) or _traits(func)
        if trait.asks or self.inside:
            return self.dispatch(func, types, args, kwargs)
        self.inside = True
        try:
            result = self._run(trait, func, types, args, kwargs)
        except Exception as error:
            if self.tracer is not None:
                self.tracer.fail(func, args, error)
            raise
        finally:
            self.inside = False
            if len(self.memo):
                self.memo.clear()
        if self.tracer is not None:
            self.tracer.see(func, args, result)
        return result

    def _run(self, trait: "_Traits", func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if FakeTensor in types:
            if trait.fills and isinstance(args[0], FakeTensor):
                return args[0]  # weights are initialised: most of the time of building a model
            if trait.indexes:
                args = [args[0], _counted(args[1]), *args[2:]]
            args, dtypes = self._fakes(args)
            if not trait.promotes and len(dtypes & FLOATS) > 1:
                self._refuse(func, args, kwargs)
            if func is GROUPED and dtypes & FLOATS != {torch.bfloat16}:
                return self._grouped(func, types, args, kwargs)
            result = self.dispatch(func, types, args, kwargs)
            if trait.assume is None:
                return result
            self.assumed = True
            return trait.assume(result)
        if trait.factory and not types and _makes_floats(func, args, kwargs):
            return self.dispatch(func, types, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype in FLOATS and result.numel() > READ:
            return self.from_tensor(result)
        return result

    def _grouped(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The matmul of a mixture of experts in another dtype than bfloat16, which PyTorch's rule
        for its shape refuses though the CPU's operation does not."""
        dtype = args[0].dtype
        with unset_fake_temporarily():
            one = torch.zeros(1, 16, 16, dtype=dtype)
            func(one[0], one, offs=torch.tensor([16], dtype=torch.int32))
        cast = torch.ops.aten._to_copy.default
        half = [
            self.dispatch(cast, types, (x,), {"dtype": torch.bfloat16})
            if isinstance(x, torch.Tensor) and x.dtype == dtype
            else x
            for x in args
        ]
        result = self.dispatch(func, types, half, kwargs)
        return self.dispatch(cast, types, (result,), {"dtype": dtype})

    def _fakes(self, args: Any) -> tuple[list[Any], set[torch.dtype]]:
        """Arguments with fake tensors instead of real ones, always the same for the same, and their
        dtypes. PyTorch remembers what an operation on fake tensors returns, and computes anew where
        one of them is real."""
        given: list[Any] = []
        dtypes: set[torch.dtype] = set()
        for arg in args:
            if isinstance(arg, torch.Tensor):
                dtypes.add(arg.dtype)
                given.append(arg if isinstance(arg, FakeTensor) else self._fake(arg))
            elif type(arg) is list:
                given.append(self._fakes(arg)[0])
            else:
                given.append(arg)
        return given, dtypes

    def _fake(self, real: torch.Tensor) -> FakeTensor:
        key = (real.untyped_storage()._cdata, real.dtype, real.shape, real.stride())
        if key not in self.known:
            self.known[key] = (real, self.from_tensor(real))  # who is kept keeps its storage
        return self.known[key][1]

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        signature = (func, *((x.dtype, tuple(x.shape)) for x in flat))
        if signature not in self.refusals:
            self.refusals[signature] = _refusal(func, args, kwargs)
        if (error := self.refusals[signature]) is not None:
            raise type(error)(*error.args)


class _Traits(NamedTuple):
    """What there is to know about an operation: it asks for a device and computes nothing; mixed
    dtypes promote each other in it; it makes a tensor of nothing; it gives a tensor other numbers;
    it takes a list of indices; what is assumed of its result."""

    asks: bool
    promotes: bool
    factory: bool
    fills: bool
    indexes: bool
    assume: Callable[[Any], Any] | None


_TRAITS: dict[Any, _Traits] = {}


def _traits(func: Any) -> _Traits:
    name = func._schema.name
    _TRAITS[func] = _Traits(
        name.startswith("prim::"),
        torch.Tag.pointwise in func.tags,
        name.partition("::")[2] in FACTORIES,
        name.partition("::")[2] in FILLS,
        name in ("aten::index", "aten::index_put", "aten::index_put_"),
        _ASSUME.get(name),
    )
    return _TRAITS[func]


def _makes_floats(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a factory makes floating numbers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point)
    return not (func._schema.name == "aten::full" and isinstance(args[1], (bool, int)))


def _refusal(func: Any, args: Any, kwargs: Any) -> Exception | None:
    """What the real operation raises because of its operands' dtypes; None if it runs.

    It is asked on small zeros first. If it does not run there even with one dtype, its other
    arguments name the shapes, and it is asked at the shapes it has.
    """
    if func._schema.name in (
        "aten::index_put",
        "aten::index_put_",
    ):  # a mask of zeros picks nothing
        one = [torch.zeros(1, dtype=torch.long)]
        into, values = (torch.zeros(1, dtype=args[place].dtype) for place in (0, 2))
        return _asked(func, (into, one, values), {}, lambda x: list(x.shape), mixed=True)
    small = _asked(func, args, kwargs, lambda x: [min(n, 2) for n in x.shape], mixed=False)
    if small is None:
        return _asked(func, args, kwargs, lambda x: [min(n, 2) for n in x.shape], mixed=True)
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if sum(x.numel() for x in flat) > ENOUGH and func._schema.is_mutable:
        return None
    error = _asked(func, args, kwargs, lambda x: list(x.shape), mixed=True)
    # The large ones are one number seen many times, which some operations take for no tensor.
    return error if "type" in str(error) else None


def _asked(
    func: Any, args: Any, kwargs: Any, shape: Callable[[torch.Tensor], list[int]], mixed: bool
) -> Exception | None:
    def real(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        dtype = x.dtype if mixed or x.dtype not in FLOATS else torch.float32
        size = shape(x)
        if torch.Size(size).numel() > ENOUGH:
            return torch.zeros(1, dtype=dtype).expand(size)
        return torch.zeros(size, dtype=dtype)

    try:
        func(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
    except Exception as error:
        return error
    return None


def _counted(indices: Any) -> list[Any]:
    """Indices with the places where a mask is True instead of the mask, whose sum would be unknown
    once it is a fake tensor."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor):
            mask = index.dtype in (torch.bool, torch.uint8)
            places += index.nonzero(as_tuple=True) if mask else [index]
        else:
            places.append(index)
    return places


def _first_ones(result: Any) -> Any:
    """Indices that count up instead of unknown ones: the first k, in their order."""

    def known(x: Any) -> Any:
        if not isinstance(x, FakeTensor) or x.dtype != torch.int64:
            return x
        with unset_fake_temporarily():
            last = x.shape[-1] if x.dim() else 1
            return torch.arange(last).expand(x.shape).contiguous() if x.dim() else torch.tensor(0)

    return pytree.tree_map(known, result)


def _zeros(result: Any) -> Any:
    def known(x: Any) -> Any:
        if not isinstance(x, FakeTensor) or x.dtype != torch.int64:
            return x
        with unset_fake_temporarily():
            return torch.zeros(x.shape, dtype=x.dtype)

    return pytree.tree_map(known, result)


def _everywhere(value: bool) -> Callable[[Any], Any]:
    def known(x: Any) -> Any:
        with unset_fake_temporarily():
            return torch.full(x.shape, value)

    return known


_ASSUME: dict[str, Callable[[Any], Any]] = {
    "aten::topk": _first_ones,
    "aten::sort": _first_ones,
    "aten::argsort": _first_ones,
    "aten::argmax": _zeros,
    "aten::argmin": _zeros,
    "aten::max": _zeros,
    "aten::min": _zeros,
    "aten::any": _everywhere(False),
    "aten::all": _everywhere(True),
    "aten::isinf": _everywhere(False),
    "aten::isnan": _everywhere(False),
    "aten::isfinite": _everywhere(True),
}
