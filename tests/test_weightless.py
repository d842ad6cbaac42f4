"""Tensors without data, against the same code on tensors that have some."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from helpers.weightless import Weightless

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def linear(a, b, bias=None):
    return F.linear(made((2, 16, 8), a), made((4, 8), b), bias)


# Every way in which layers bring two or three floating tensors together.
OPERATIONS = {
    "linear": lambda a, b, c: linear(a, b),
    "linear with bias": lambda a, b, c: linear(a, b, made(4, c)),
    "large linear": lambda a, b, c: F.linear(made((2, 16, 300), a), made((700, 300), b)),
    "matmul": lambda a, b, c: made((2, 3, 4, 8), a) @ made((2, 3, 8, 4), b),
    "bmm": lambda a, b, c: torch.bmm(made((2, 3, 4), a), made((2, 4, 3), b)),
    "baddbmm": lambda a, b, c: torch.baddbmm(
        made((2, 3, 3), c), made((2, 3, 4), a), made((2, 4, 3), b)
    ),
    "einsum": lambda a, b, c: torch.einsum("bij,jk->bik", made((2, 3, 4), a), made((4, 5), b)),
    "conv1d": lambda a, b, c: F.conv1d(made((2, 8, 20), a), made((16, 8, 3), b), made(16, c)),
    "depthwise": lambda a, b, c: F.conv1d(made((2, 8, 20), a), made((8, 1, 3), b), groups=8),
    "conv2d": lambda a, b, c: F.conv2d(made((2, 3, 28, 28), a), made((8, 3, 14, 14), b)),
    "layer norm": lambda a, b, c: F.layer_norm(made((2, 5, 8), a), (8,), made(8, b), made(8, c)),
    "rms norm": lambda a, b, c: F.rms_norm(made((2, 5, 8), a), (8,), made(8, b)),
    "group norm": lambda a, b, c: F.group_norm(made((2, 8, 5), a), 2, made(8, b), made(8, c)),
    "sdpa": lambda a, b, c: F.scaled_dot_product_attention(
        made((2, 2, 4, 8), a), made((2, 2, 4, 8), b), made((2, 2, 4, 8), c)
    ),
    "cat": lambda a, b, c: torch.cat([made((2, 3), a), made((2, 3), b)]),
    "mul": lambda a, b, c: made((2, 3), a) * made((2, 3), b),
    "in place": lambda a, b, c: made((2, 3), a).add_(made((2, 3), b)),
    "index_put": lambda a, b, c: made((4, 3), a).index_put_(
        (torch.tensor([0, 1]),), made((2, 3), b)
    ),
    "masked_scatter": lambda a, b, c: made((2, 3), a).masked_scatter(
        torch.ones(2, 3, dtype=torch.bool), made((2, 3), b)
    ),
    "index_copy": lambda a, b, c: made((4, 3), a).index_copy_(
        0, torch.tensor([0, 1]), made((2, 3), b)
    ),
    "index_add": lambda a, b, c: made((4, 3), a).index_add_(
        0, torch.tensor([0, 1]), made((2, 3), b)
    ),
    "scatter": lambda a, b, c: made((4, 3), a).scatter_(
        0, torch.zeros(2, 3, dtype=torch.long), made((2, 3), b)
    ),
    "where": lambda a, b, c: torch.where(torch.ones(3, dtype=torch.bool), made(3, a), made(3, b)),
    "copy_": lambda a, b, c: made(3, a).copy_(made(3, b)),
    "prelu": lambda a, b, c: F.prelu(made((2, 8, 3), a), made(8, b)),
}


def outcome(operation, dtypes):
    """The dtype of the result, or the exception's type and text."""
    try:
        with torch.no_grad():
            return OPERATIONS[operation](*dtypes).dtype
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_mixed_dtypes_are_refused_as_on_real_tensors(operation):
    for dtypes in [(a, b, c) for a in DTYPES for b in DTYPES for c in DTYPES]:
        with Weightless():
            without_data = outcome(operation, dtypes)
        assert without_data == outcome(operation, dtypes), dtypes


def test_the_refusals_are_not_empty():
    """The parametrized test compares texts only where there are some."""
    refused = {name for name in OPERATIONS if isinstance(outcome(name, DTYPES), tuple)}
    assert {"linear", "linear with bias", "matmul", "bmm", "conv1d", "sdpa", "index_put"} <= refused
    assert not {"mul", "cat", "where", "copy_"} & refused


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3000), st.booleans())
def test_a_refusal_depends_on_no_size(rows, inner, columns, bias):
    def call():
        extra = made(columns, torch.bfloat16) if bias else None
        weight = made((columns, inner), torch.bfloat16)
        return F.linear(made((2, rows, inner), torch.float32), weight, extra)

    with pytest.raises(RuntimeError) as real:
        call()
    with Weightless(), pytest.raises(RuntimeError) as without_data:
        call()
    assert str(without_data.value) == str(real.value)


def test_floats_have_no_memory_and_integers_are_real():
    with Weightless():
        weights = torch.empty(2**20, 2**20)  # 4 TiB
        mask = torch.ones(2, 4, dtype=torch.long)
        mask[0, :2] = 0
        assert isinstance(weights, FakeTensor)
        assert isinstance(weights @ weights[:, :3], FakeTensor)
        assert mask.sum(-1).tolist() == [2, 4]
        assert torch.nonzero(mask.flatten()).flatten().tolist() == [2, 3, 4, 5, 6, 7]
        assert [x.item() for x in torch.linspace(0, 1, 3)] == [0, 0.5, 1]
        assert not isinstance(torch.arange(2**10).float(), FakeTensor)
        assert isinstance(torch.arange(2**21).float(), FakeTensor)


def test_a_real_mask_chooses_among_floats_without_data():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    with Weightless():
        hidden = torch.rand(2, 3, 8)
        assert hidden[mask].shape == (3, 8)
        assert hidden[:, torch.tensor([True, False, True])].shape == (2, 2, 8)
        hidden[mask] = torch.rand(3, 8)
        assert hidden.shape == (2, 3, 8)


def test_what_numbers_decide_is_assumed_or_refused():
    with Weightless():
        scores = torch.rand(3, 8).softmax(-1)
        _, experts = scores.topk(2)
        assert experts.tolist() == [[0, 1]] * 3
        assert scores.argmax(-1).tolist() == [0, 0, 0]
        assert not torch.isinf(scores).any()
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            scores.sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_can_be_cast_and_built_on(dtype):
    with Weightless():
        layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)).to(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer.float()(torch.rand(2, 8)).dtype == torch.float32


def test_nothing_is_left_behind():
    before = torch.rand(2)
    with Weightless(), pytest.raises(RuntimeError):
        linear(torch.float32, torch.bfloat16)
    assert type(torch.rand(2)) is type(before) is torch.Tensor
    assert torch.zeros(3).sum().item() == 0
