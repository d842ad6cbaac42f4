"""The reference kernel against float64, upstream's order of checks, and real Transformers."""

import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import helpers.reference_kernel
from helpers.reference_kernel import attention
from helpers.reference_kernel.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

REPO_ID = "kernels-community/flash-attn2"
FLOAT32_MESSAGE = "FlashAttention only support fp16 and bf16 data type"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With tensors this small, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The oracle: attention by its definition, one sequence, float64, with a loop for the mask.


class Exact(NamedTuple):
    """Exact results, and for each the sum of the magnitudes that were added up to get it."""

    out: Tensor
    out_size: Tensor
    lse: Tensor
    dq: Tensor
    dq_size: Tensor
    dk: Tensor
    dk_size: Tensor
    dv: Tensor
    dv_size: Tensor


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    dout: Tensor | None = None,
) -> Exact:
    """q, dout: (seqlen_q, heads, head_size); k, v: (seqlen_k, heads_k, head_size)."""
    dout = torch.zeros_like(q) if dout is None else dout
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads_k, group = k.shape[1], q.shape[1] // k.shape[1]
    of_query = [head // group for head in range(q.shape[1])]
    k, v = k[:, of_query], v[:, of_query]

    def sees(i: int, j: int) -> bool:
        own = i + len(k) - len(q)
        right = 0 if causal else window[1]
        return (window[0] < 0 or j >= own - window[0]) and (right < 0 or j <= own + right)

    seen = torch.tensor([sees(i, j) for i in range(len(q)) for j in range(len(k))])
    seen = seen.bool().view(len(q), len(k))

    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    weights = torch.where(seen, scores, -torch.inf).exp()  # scores are far from overflow here
    total = weights.sum(-1)
    p = torch.where(total[..., None] > 0, weights / total[..., None], 0.0)
    out = torch.einsum("hij,jhd->ihd", p, v)

    dp = torch.einsum("ihd,jhd->hij", dout, v)
    ds = scale * p * (dp - (dout * out).sum(-1).T[..., None])
    dp_size = torch.einsum("ihd,jhd->hij", dout.abs(), v.abs())
    ds_size = scale * p * (dp_size + (dout * out).abs().sum(-1).T[..., None])

    def of_key(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads_k, group)).sum(2)

    return Exact(
        out,
        torch.einsum("hij,jhd->ihd", p, v.abs()),
        torch.where(total > 0, total.log(), torch.inf),
        torch.einsum("hij,jhd->ihd", ds, k),
        torch.einsum("hij,jhd->ihd", ds_size, k.abs()),
        of_key(torch.einsum("hij,ihd->jhd", ds, q)),
        of_key(torch.einsum("hij,ihd->jhd", ds_size, q.abs())),
        of_key(torch.einsum("hij,ihd->jhd", p, dout)),
        of_key(torch.einsum("hij,ihd->jhd", p, dout.abs())),
    )


def assert_close(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """Compare a 16-bit result with the exact one.

    What is added up may be rounded twice to 16 bits (the weights, and what they are made from),
    and the sum once; each rounding is at most eps / 2 of `size`. The gradients' `size` allows for
    another two: the stored output and the sum over a group of heads. 5 * eps / 2 in all. float16
    also has a smallest step, and a few of them may add up.
    """
    info = torch.finfo(actual.dtype)
    allowed = 2.5 * info.eps * size + 8 * info.smallest_normal * info.eps
    excess = (actual.detach().double() - expected).abs() - allowed
    assert actual.shape == expected.shape
    assert not excess.isnan().any()
    assert excess.numel() == 0 or excess.max() <= 0, (
        f"{excess.max():.3g} above what rounding allows"
    )


def assert_lse(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
windows = st.tuples(st.integers(-1, 14), st.integers(-1, 14))
head_sizes = st.sampled_from([1, 3, 8, 12, 16, 33, 64, 100, 256])
properties = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@properties
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    seqlen_q=st.integers(0, 12),
    seqlen_k=st.integers(0, 12),
    heads_k=st.integers(1, 3),
    group=st.integers(1, 3),
    head_size=head_sizes,
    causal=st.booleans(),
    window=windows,
    scale=st.sampled_from([None, 0.05, 0.7]),
)
@example(0, torch.bfloat16, 2, 9, 9, 2, 1, 64, True, (-1, -1), None)
@example(0, torch.bfloat16, 2, 5, 2, 2, 2, 8, True, (-1, -1), None)
@example(0, torch.float16, 2, 2, 5, 1, 3, 12, True, (-1, -1), None)
@example(0, torch.float16, 1, 9, 9, 1, 1, 16, True, (3, -1), None)
@example(0, torch.float16, 1, 9, 9, 1, 1, 16, False, (-1, 0), None)
@example(0, torch.float16, 1, 4, 0, 1, 1, 16, True, (-1, -1), None)
def test_dense_forward_and_backward_agree_with_float64(
    seed, dtype, batch, seqlen_q, seqlen_k, heads_k, group, head_size, causal, window, scale
):
    shape_q = (batch, seqlen_q, heads_k * group, head_size)
    shape_k = (batch, seqlen_k, heads_k, head_size)
    q, k, v, dout = randn(seed, shape_q, shape_k, shape_k, shape_q, dtype=dtype)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse, s_dmask = flash_attn_func(q, k, v, 0.0, scale, causal, window, return_attn_probs=True)
    assert out.dtype == dtype
    assert s_dmask.shape == (0,)
    out.backward(dout)
    for b in range(batch):
        want = exact(q[b], k[b], v[b], causal, window, scale, dout[b])
        assert_close(out[b], want.out, want.out_size)
        assert_lse(lse[b], want.lse)
        assert_close(q.grad[b], want.dq, want.dq_size)
        assert_close(k.grad[b], want.dk, want.dk_size)
        assert_close(v.grad[b], want.dv, want.dv_size)


@properties
@given(
    seed=seeds,
    dtype=dtypes,
    lengths=st.one_of(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
        st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9)).map(
            lambda same: [same[1:]] * same[0]
        ),
    ),
    unowned=st.integers(0, 2),
    heads_k=st.integers(1, 2),
    group=st.integers(1, 3),
    head_size=head_sizes,
    causal=st.booleans(),
    window=windows,
    as_tensor=st.booleans(),
)
def test_varlen_forward_and_backward_agree_with_float64_for_each_sequence(
    seed, dtype, lengths, unowned, heads_k, group, head_size, causal, window, as_tensor
):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    shape_q = (sum(lengths_q) + unowned, heads_k * group, head_size)
    shape_k = (sum(lengths_k) + unowned, heads_k, head_size)
    q, k, v, dout = randn(seed, shape_q, shape_k, shape_k, shape_q, dtype=dtype)
    for x in (q, k, v):
        x.requires_grad_()
    longest = [max(lengths_q), max(lengths_k)]
    if as_tensor:
        longest = [torch.tensor(x, dtype=torch.int32) for x in longest]
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cumulative(lengths_q), cumulative(lengths_k), *longest,
        causal=causal, window_size=window, return_attn_probs=True,
    )  # fmt: skip
    out.backward(dout)
    at_q = at_k = 0
    for length_q, length_k in lengths:
        rows_q, rows_k = slice(at_q, at_q + length_q), slice(at_k, at_k + length_k)
        at_q, at_k = rows_q.stop, rows_k.stop
        want = exact(q[rows_q], k[rows_k], v[rows_k], causal, window, None, dout[rows_q])
        assert_close(out[rows_q], want.out, want.out_size)
        assert_lse(lse[:, rows_q], want.lse)
        assert_close(q.grad[rows_q], want.dq, want.dq_size)
        assert_close(k.grad[rows_k], want.dk, want.dk_size)
        assert_close(v.grad[rows_k], want.dv, want.dv_size)
    assert out.shape == q.shape
    assert (out[at_q:] == 0).all()
    assert torch.isposinf(lse[:, at_q:]).all()


def cumulative(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_varlen_of_many_sequences():
    lengths = [i % 5 for i in range(300)]
    (x,) = randn(0, (sum(lengths), 2, 8), dtype=torch.bfloat16)
    edges = cumulative(lengths)
    out = flash_attn_varlen_func(x, x, x, edges, edges, 4, 4, causal=True)
    at = 0
    for length in lengths:
        rows = slice(at, at := at + length)
        want = exact(x[rows], x[rows], x[rows], causal=True)
        assert_close(out[rows], want.out, want.out_size)


@properties
@given(
    seed=seeds,
    dtype=dtypes,
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    seqlen_q=st.integers(1, 5),
    seqlen_new=st.sampled_from([None, 0, 1, 4]),
    shuffled=st.booleans(),
    use_int=st.booleans(),
    heads_k=st.integers(1, 2),
    group=st.integers(1, 3),
    head_size=head_sizes,
    causal=st.booleans(),
    window=windows,
)
def test_kvcache_appends_in_place_and_agrees_with_float64(
    seed, dtype, starts, seqlen_q, seqlen_new, shuffled, use_int, heads_k, group, head_size,
    causal, window,
):  # fmt: skip
    batch, capacity = len(starts), 10
    if use_int:
        starts = [starts[0]] * batch
    rows = list(range(batch, 0, -1)) if shuffled else list(range(batch))
    shape_new = (batch, seqlen_new or 0, heads_k, head_size)
    shape_cache = (batch + 1, capacity, heads_k, head_size)
    q, k, v, k_cache, v_cache = randn(
        seed, (batch, seqlen_q, heads_k * group, head_size), shape_new, shape_new, shape_cache,
        shape_cache, dtype=dtype,
    )  # fmt: skip
    q.requires_grad_()
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for b, row in enumerate(rows):
        for t in range(seqlen_new or 0):
            want_k[row, starts[b] + t], want_v[row, starts[b] + t] = k[b, t], v[b, t]

    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache,
        k=None if seqlen_new is None else k,
        v=None if seqlen_new is None else v,
        cache_seqlens=starts[0] if use_int else torch.tensor(starts, dtype=torch.int32),
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32) if shuffled else None,
        causal=causal, window_size=window, return_softmax_lse=True,
    )  # fmt: skip
    assert not out.requires_grad
    assert torch.equal(k_cache, want_k)
    assert torch.equal(v_cache, want_v)
    for b, row in enumerate(rows):
        end = starts[b] + (seqlen_new or 0)
        want = exact(q[b], want_k[row, :end], want_v[row, :end], causal, window)
        assert_close(out[b], want.out, want.out_size)
        assert_lse(lse[b], want.lse)


def test_kvcache_without_lengths_uses_the_whole_cache():
    q, k, v = randn(0, (2, 3, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), dtype=torch.float16)
    out = flash_attn_with_kvcache(q, k, v, causal=True)
    for b in range(2):
        want = exact(q[b], k[b], v[b], causal=True)
        assert_close(out[b], want.out, want.out_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_keeps_a_weight_with_probability_1_minus_p_and_scales_it(dtype):
    torch.manual_seed(0)
    keys = 64
    q, k = randn(0, (1, keys, 4, keys), (1, keys, 4, keys), dtype=dtype)
    v = torch.eye(keys, dtype=dtype)[None, :, None].expand(1, keys, 4, keys)  # out is the weights
    kept, dropped = flash_attn_func(q, k, v), flash_attn_func(q, k, v, dropout_p=0.25)
    survived = dropped != 0
    # 16384 draws: the share is within 5 standard deviations of sqrt(p (1 - p) / n) = 0.0034
    assert abs(survived.double().mean().item() - 0.75) < 0.017
    torch.testing.assert_close(
        (dropped * 0.75)[survived], kept[survived], rtol=3 * torch.finfo(dtype).eps, atol=1e-6
    )


# Checks: upstream's order and upstream's text.


def parameters(function: Any) -> list[str]:
    return [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    ]


def test_signatures_are_upstreams():
    """flash_attn/flash_attn_interface.py, lines 1156, 1391 and 1485."""
    options = [
        "dropout_p=0.0", "softmax_scale=None", "causal=False", "window_size=(-1, -1)",
        "softcap=0.0", "alibi_slopes=None", "deterministic=False", "return_attn_probs=False",
    ]  # fmt: skip
    cu = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert parameters(flash_attn_func) == ["q", "k", "v", *options]
    assert parameters(flash_attn_varlen_func) == ["q", "k", "v", *cu, *options, "block_table=None"]
    assert parameters(flash_attn_with_kvcache) == [
        "q", "k_cache", "v_cache", "k=None", "v=None", "rotary_cos=None", "rotary_sin=None",
        "cache_seqlens=None", "cache_batch_idx=None", "cache_leftpad=None", "block_table=None",
        "softmax_scale=None", "causal=False", "window_size=(-1, -1)", "softcap=0.0",
        "rotary_interleaved=True", "alibi_slopes=None", "num_splits=0",
        "return_softmax_lse=False",
    ]  # fmt: skip


def zeros(
    *shape: int, dtype: torch.dtype = torch.bfloat16, strided: bool = False, longer: int = 0
) -> Tensor:
    *outer, rows, columns = shape
    if strided:
        return torch.zeros(*outer, columns + longer, rows, dtype=dtype).transpose(-1, -2)
    return torch.zeros(*outer, rows, columns + longer, dtype=dtype)


def integers(
    *shape: int, long: bool = False, strided: bool = False, column: bool = False
) -> Tensor:
    x = torch.zeros(*shape, 2, dtype=torch.int64 if long else torch.int32)[..., 0]
    x = x if strided else x.contiguous()
    return x[:, None] if column else x


SAME: dict[str, Any] = {}


def call_dense(q=SAME, k=SAME, v=SAME, sizes=SAME, options=SAME):
    at = {"batch": 2, "seqlen_q": 4, "seqlen_k": 4, "heads": 4, "head_size": 16, **sizes}
    shape_k = (at["batch"], at["seqlen_k"], 2, at["head_size"])
    return flash_attn_func(
        zeros(at["batch"], at["seqlen_q"], at["heads"], at["head_size"], **q),
        zeros(*shape_k, **k),
        zeros(*shape_k, **v),
        **options,
    )


def call_varlen(q=SAME, k=SAME, v=SAME, cu_q=SAME, cu_k=SAME, sizes=SAME, options=SAME):
    at = {"batch": 2, "seqlen_q": 4, "seqlen_k": 4, "heads": 4, "head_size": 16, **sizes}
    return flash_attn_varlen_func(
        zeros(at["seqlen_q"], at["heads"], at["head_size"], **q),
        zeros(at["seqlen_k"], 2, at["head_size"], **k),
        zeros(at["seqlen_k"], 2, at["head_size"], **v),
        integers(at["batch"] + 1, **cu_q),
        integers(3, **cu_k),
        4,
        4,
        **options,
    )


def call_kvcache(
    q=SAME,
    k_cache=SAME,
    v_cache=SAME,
    k=SAME,
    v=SAME,
    cache_seqlens=SAME,
    idx=SAME,
    sizes=SAME,
    options=SAME,
):
    at = {"batch": 2, "seqlen_q": 4, "new": 2, "heads": 4, "head_size": 16, **sizes}
    shape_cache, shape_new = (3, 8, 2, at["head_size"]), (2, at["new"], 2, at["head_size"])
    made = {
        "k": zeros(*shape_new, **k),
        "v": zeros(*shape_new, **v),
        "cache_seqlens": integers(2, **cache_seqlens),
        "cache_batch_idx": integers(2, **idx),
    }
    return flash_attn_with_kvcache(
        zeros(at["batch"], at["seqlen_q"], at["heads"], at["head_size"], **q),
        zeros(*shape_cache, **k_cache),
        zeros(*shape_cache, **v_cache),
        **{**made, **options},
    )


FLOAT32, FLOAT64 = {"dtype": torch.float32}, {"dtype": torch.float64}
STRIDED, LONGER = {"strided": True}, {"longer": 8}
INPUT_CONTIGUOUS = "Input tensor must have contiguous last dimension"
HEAD_SIZE_256 = "FlashAttention forward only supports head dimension at most 256"
HEADS_DIVIDE = "Number of heads in key/value must divide number of heads in query"
SOFTCAP = "Softcapping does not support dropout for now"
DROPOUT = (
    "Expected p_dropout < 1.f to be true, but got false.  (Could this error message be improved?  "
    "If so, please report an enhancement request to PyTorch.)"
)

# The line of csrc/flash_attn/flash_api.cpp at commit 0251105, its message, and one way to break the
# rule. Only an empty tensor keeps its strides through contiguous(), hence the lengths of 0.
DENSE = [
    (396, FLOAT32_MESSAGE, {"q": FLOAT32}),
    (398, "query and key must have the same dtype", {"k": FLOAT64}),
    (399, "query and value must have the same dtype", {"v": FLOAT64}),
    (403, INPUT_CONTIGUOUS, {"q": STRIDED, "sizes": {"seqlen_q": 0}}),
    (404, INPUT_CONTIGUOUS, {"k": STRIDED, "sizes": {"seqlen_k": 0}}),
    (405, INPUT_CONTIGUOUS, {"v": STRIDED, "sizes": {"seqlen_k": 0}}),
    (415, "batch size must be positive", {"sizes": {"batch": 0}}),
    (416, HEAD_SIZE_256, {"sizes": {"head_size": 264}}),
    (418, HEADS_DIVIDE, {"sizes": {"heads": 5}}),
    (420, SOFTCAP, {"options": {"softcap": 30.0, "dropout_p": 0.5}}),
    (440, "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)", {"k": LONGER}),
    (441, "v must have shape (batch_size, seqlen_k, num_heads_k, head_size)", {"v": LONGER}),
    (150, DROPOUT, {"options": {"dropout_p": 1.0}}),  # set_params_fprop, called at 476
]
VARLEN = [
    (575, FLOAT32_MESSAGE, {"q": FLOAT32}),
    (577, "query and key must have the same dtype", {"k": FLOAT64}),
    (578, "query and value must have the same dtype", {"v": FLOAT64}),
    (579, "cu_seqlens_q must have dtype int32", {"cu_q": {"long": True}}),
    (580, "cu_seqlens_k must have dtype int32", {"cu_k": {"long": True}}),
    (595, INPUT_CONTIGUOUS, {"q": STRIDED, "sizes": {"seqlen_q": 0}}),
    (596, INPUT_CONTIGUOUS, {"k": STRIDED, "sizes": {"seqlen_k": 0}}),
    (597, INPUT_CONTIGUOUS, {"v": STRIDED, "sizes": {"seqlen_k": 0}}),
    (598, "cu_seqlens_q must be contiguous", {"cu_q": STRIDED}),
    (599, "cu_seqlens_k must be contiguous", {"cu_k": STRIDED}),
    (608, SOFTCAP, {"options": {"softcap": 30.0, "dropout_p": 0.5}}),
    (633, "batch size must be positive", {"sizes": {"batch": 0}}),
    (634, HEAD_SIZE_256, {"sizes": {"head_size": 264}}),
    (636, HEADS_DIVIDE, {"sizes": {"heads": 5}}),
    (644, "k must have shape (total_k, num_heads_k, head_size)", {"k": LONGER}),
    (645, "v must have shape (total_k, num_heads_k, head_size)", {"v": LONGER}),
    (652, "cu_seqlens_q must have shape (batch_size + 1)", {"cu_q": {"column": True}}),
    (653, "cu_seqlens_k must have shape (batch_size + 1)", {"cu_k": {"column": True}}),
    (150, DROPOUT, {"options": {"dropout_p": 1.0}}),  # set_params_fprop, called at 700
]
SHAPE_CACHE = "must have shape (batch_size_c, seqlen_k, num_heads_k, head_size_og)"
SHAPE_NEW = "must have shape (batch_size, seqlen_knew, num_heads_k, head_size_og)"
KVCACHE = [
    # Lines 1593 and 1594 of flash_attn_interface.py
    (1593, "k_cache must have contiguous last dimension", {"k_cache": STRIDED}),
    (1594, "v_cache must have contiguous last dimension", {"v_cache": STRIDED}),
    (1274, FLOAT32_MESSAGE, {"q": FLOAT32}),
    (1276, "query and key must have the same dtype", {"k_cache": FLOAT64}),
    (1277, "query and value must have the same dtype", {"v_cache": FLOAT64}),
    (1281, INPUT_CONTIGUOUS, {"q": STRIDED, "sizes": {"seqlen_q": 0}}),
    (1309, "batch size must be positive", {"sizes": {"batch": 0}}),
    (1310, HEAD_SIZE_256, {"sizes": {"head_size": 257}}),
    (1311, HEADS_DIVIDE, {"sizes": {"heads": 5}}),
    (1332, f"kcache {SHAPE_CACHE}", {"k_cache": LONGER}),
    (1333, f"vcache {SHAPE_CACHE}", {"v_cache": LONGER}),
    (1395, "If key is supplied, value must also be passed in", {"options": {"v": None}}),
    (
        1396,
        "If key is supplied, seqlens_k must also be passed in",
        {"options": {"cache_seqlens": None}},
    ),
    (
        1397,
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
        {"sizes": {"seqlen_q": 9}},
    ),
    (1400, "Key must have the same dtype as query", {"k": FLOAT64}),
    (1401, "Value must have the same dtype as query", {"v": FLOAT64}),
    (1403, "Key tensor must have contiguous last dimension", {"k": STRIDED, "sizes": {"new": 0}}),
    (1404, "Value tensor must have contiguous last dimension", {"v": STRIDED, "sizes": {"new": 0}}),
    (1406, f"k {SHAPE_NEW}", {"k": LONGER}),
    (1407, f"v {SHAPE_NEW}", {"v": LONGER}),
    (1429, "seqlens_k must have dtype int32", {"cache_seqlens": {"long": True}}),
    (1431, "seqlens_k must be contiguous", {"cache_seqlens": STRIDED}),
    (1432, "seqlens_k must have shape (batch_size)", {"cache_seqlens": {"column": True}}),
    (1492, "cache_batch_idx must have dtype int32", {"idx": {"long": True}}),
    (343, "num_splits > 128 not supported", {"options": {"num_splits": 129}}),  # called at 1498
]
# Two rules that one call cannot break both: what is missing has no dtype, one queries' length is
# not both 0 and 9, and the single entry of a batch of 0 is always contiguous.
EXCLUSIVE = {
    *((1395, line) for line in (1401, 1404, 1407)),
    *((1396, line) for line in (1429, 1431, 1432)),
    (1281, 1397),
    (598, 633),
}


@pytest.mark.parametrize(
    ("call", "rules"),
    [(call_dense, DENSE), (call_varlen, VARLEN), (call_kvcache, KVCACHE)],
    ids=["dense", "varlen", "kvcache"],
)
def test_of_two_broken_rules_the_one_that_upstream_checks_first_is_reported(call, rules):
    call()
    wrong = []
    for i, (line, message, breaks) in enumerate(rules):
        for other_line, _, also_breaks in rules[i:]:
            if (line, other_line) in EXCLUSIVE:
                continue
            names = breaks.keys() | also_breaks.keys()
            both = {n: {**breaks.get(n, {}), **also_breaks.get(n, {})} for n in names}
            error = AssertionError if line in (1593, 1594) else RuntimeError
            with pytest.raises(error) as caught:
                call(**both)
            if str(caught.value) != message:
                wrong.append((line, other_line, str(caught.value)))
    assert not wrong


@pytest.mark.parametrize("head_size", [8, 9, 255, 256])
def test_any_head_size_up_to_256_is_padded_and_accepted(head_size):
    assert call_dense(sizes={"head_size": head_size}).shape == (2, 4, 4, head_size)
    assert call_varlen(sizes={"head_size": head_size}).shape == (4, 4, head_size)
    assert call_kvcache(sizes={"head_size": head_size}).shape == (2, 4, 4, head_size)


def test_a_strided_last_dimension_is_made_contiguous_as_upstreams_python_layer_does():
    q, k, v = randn(0, (2, 5, 16, 2), (2, 5, 16, 2), (2, 5, 16, 2), dtype=torch.bfloat16)
    strided = [x.transpose(2, 3) for x in (q, k, v)]
    out = flash_attn_func(*strided)
    assert torch.equal(out, flash_attn_func(*(x.contiguous() for x in strided)))
    with pytest.raises(AssertionError, match="k_cache must have contiguous last dimension"):
        flash_attn_with_kvcache(*strided)


def test_a_dimension_too_many_is_reported_as_upstream_does():
    dense, packed = torch.zeros(2, 4, 4, 8, 8).half(), torch.zeros(2, 4, 8, 8).half()
    edges = integers(3)
    with pytest.raises(RuntimeError, match=r"^q must have shape \(batch_size, seqlen_q, num_heads"):
        flash_attn_func(dense, dense, dense)
    with pytest.raises(RuntimeError, match=r"^q must have shape \(batch_size, seqlen_q, num_heads"):
        flash_attn_with_kvcache(dense, dense, dense)
    with pytest.raises(
        RuntimeError, match=r"^q must have shape \(total_q, num_heads, head_size\)$"
    ):
        flash_attn_varlen_func(packed, packed, packed, edges, edges, 4, 4)
    # A batch where packed tokens belong: its 4 heads are taken for the head size (lines 605, 635).
    packed = packed.transpose(1, 2)
    with pytest.raises(RuntimeError, match=r"must have a head_size that is a multiple of 8$"):
        flash_attn_varlen_func(packed, packed, packed, edges, edges, 4, 4)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "name", "options"),
    [
        (call_dense, "softcap", {"softcap": 30.0}),
        (call_dense, "alibi_slopes", {"alibi_slopes": ONE}),
        (call_dense, "return_attn_probs", {"return_attn_probs": True, "dropout_p": 0.1}),
        (call_varlen, "softcap", {"softcap": 30.0}),
        (call_varlen, "alibi_slopes", {"alibi_slopes": ONE}),
        (call_varlen, "block_table", {"block_table": ONE}),
        (call_varlen, "return_attn_probs", {"return_attn_probs": True, "dropout_p": 0.1}),
        (call_kvcache, "softcap", {"softcap": 30.0}),
        (call_kvcache, "alibi_slopes", {"alibi_slopes": ONE}),
        (call_kvcache, "block_table", {"block_table": ONE}),
        (call_kvcache, "cache_leftpad", {"cache_leftpad": ONE}),
        (call_kvcache, "rotary_cos", {"rotary_cos": ONE, "rotary_sin": ONE}),
        (call_kvcache, "rotary_sin", {"rotary_sin": ONE}),
    ],
)
def test_what_is_not_implemented_says_so_and_only_after_the_dtype_check(call, name, options):
    with pytest.raises(NotImplementedError, match=f"does not implement {name}.*GPU"):
        call(options=options)
    with pytest.raises(RuntimeError, match=FLOAT32_MESSAGE):
        call(q=FLOAT32, options=options)


@pytest.mark.parametrize(
    ("edges_q", "edges_k", "max_q", "max_k", "sentence"),
    [
        ([0, 4, 9], [0, 4, 4], 9, 9, "cu_seqlens_q is [0, 4, 9]"),
        ([0, 4, 4], [0, 4, 9], 9, 9, "cu_seqlens_k is [0, 4, 9]"),
        ([0, 3, 2], [0, 4, 4], 4, 4, "cu_seqlens_q is [0, 3, 2]"),
        ([1, 3, 4], [0, 4, 4], 4, 4, "cu_seqlens_q is [1, 3, 4]"),
        ([0, 4, 4], [0, 4, 4], 3, 4, "max_seqlen_q is 3, but cu_seqlens_q holds a sequence of 4"),
        ([0, 4, 4], [0, 4, 4], 4, 3, "max_seqlen_k is 3, but cu_seqlens_k holds a sequence of 4"),
    ],
)
def test_varlen_refuses_lengths_that_contradict_the_tensors(
    edges_q, edges_k, max_q, max_k, sentence
):
    x = zeros(4, 2, 8)
    edges = [torch.tensor(e, dtype=torch.int32) for e in (edges_q, edges_k)]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        flash_attn_varlen_func(x, x, x, *edges, max_q, max_k)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cache_seqlens": 7}, "would end at [9, 9] in a cache of 8 tokens"),
        ({"cache_seqlens": -1}, "would end at [1, 1] in a cache of 8 tokens"),
        ({"k": None}, "v was given without k"),
        ({"cache_batch_idx": torch.tensor([0, 3]).int()}, "use the rows [0, 3] of a cache that"),
        ({"cache_batch_idx": torch.tensor([0, -1]).int()}, "use the rows [0, -1] of a cache that"),
        ({"cache_batch_idx": torch.tensor([0]).int()}, "use the rows [0] of a cache that has 3"),
    ],
)
def test_kvcache_refuses_what_does_not_fit_the_cache(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call_kvcache(options=options)


# The surroundings: fake tensors, autocast, gradients, watchers.


def test_fake_tensors_pass_and_fail_like_real_ones():
    with FakeTensorMode():
        q = torch.empty(2, 128, 8, 100, dtype=torch.bfloat16)
        k = torch.empty(2, 192, 2, 100, dtype=torch.bfloat16)
        for options in ({}, {"causal": True}, {"window_size": (7, 3)}):
            out, lse, _ = flash_attn_func(q, k, k, **options, return_attn_probs=True)
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert (lse.shape, lse.dtype) == ((2, 8, 128), torch.float32)
        with pytest.raises(RuntimeError) as caught:
            flash_attn_func(q.float(), k.float(), k.float())
        assert str(caught.value) == FLOAT32_MESSAGE


@pytest.mark.parametrize("ambient", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype, ambient):
    q, k, v = randn(0, (1, 5, 4, 16), (1, 5, 2, 16), (1, 5, 2, 16), dtype=dtype)
    plain = flash_attn_func(q, k, v, return_attn_probs=True)
    with torch.autocast("cpu", dtype=ambient):
        inside = flash_attn_func(q, k, v, return_attn_probs=True)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError, match=FLOAT32_MESSAGE):
            flash_attn_func(q.float(), k.float(), v.float())
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(mode):
    q, k, v = randn(0, (1, 5, 4, 16), (1, 7, 2, 16), (1, 7, 2, 16), dtype=torch.bfloat16)
    q.requires_grad_()
    with_grad = flash_attn_func(q, k, v, causal=True)
    with mode():
        without = flash_attn_func(q, k, v, causal=True)
    assert with_grad.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_grad, without)


def test_only_what_requires_gradients_gets_them():
    q, k, v = randn(0, (1, 5, 4, 16), (1, 5, 2, 16), (1, 5, 2, 16), dtype=torch.bfloat16)
    v.requires_grad_()
    flash_attn_func(q, k, v).sum().backward()
    assert v.grad is not None
    assert q.grad is None
    assert k.grad is None


def test_watchers_see_the_dtypes_on_arrival_also_of_a_call_that_fails():
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    seen: list[attention.GateCall] = []
    attention.watchers.append(seen.append)
    try:
        call_dense()
        call_kvcache()
        for call in (call_dense, call_varlen):
            with pytest.raises(RuntimeError):
                call(q=FLOAT32, v=FLOAT64)
        with pytest.raises(AssertionError):
            call_kvcache(q=FLOAT32, v_cache=FLOAT64, k_cache=STRIDED)
    finally:
        attention.watchers.remove(seen.append)
    call_dense()
    assert [(call.entry, call.q.dtype, call.k.dtype, call.v.dtype) for call in seen] == [
        ("flash_attn_func", bf16, bf16, bf16),
        ("flash_attn_with_kvcache", bf16, bf16, bf16),
        ("flash_attn_func", f32, bf16, f64),
        ("flash_attn_varlen_func", f32, bf16, f64),
        ("flash_attn_with_kvcache", f32, bf16, f64),
    ]


# The real libraries: `kernels` finds the folder, Transformers calls what it finds.


@pytest.fixture
def local_kernel(monkeypatch):
    import kernels.importer

    folder = os.path.relpath(Path(helpers.reference_kernel.__file__).parent)
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO_ID}={folder}")
    monkeypatch.setattr(kernels.importer, "_loaded_kernels", {})


@pytest.mark.parametrize("name", ["CPU", "Metal", "CUDA", "ROCm", "XPU", "CANN"])
def test_the_kernels_library_loads_the_folder_for_each_backend(name, local_kernel, monkeypatch):
    import kernels
    import kernels.backends
    from packaging.version import Version

    kind = getattr(kernels.backends, name)
    backend = kind() if name in ("CPU", "Metal") else kind(version=Version("12.8"))
    monkeypatch.setattr(kernels.backends, "_backend", lambda: backend)
    module = kernels.get_kernel(REPO_ID, version=4)
    assert module.flash_attn_func is flash_attn_func
    assert module.flash_attn_varlen_func is flash_attn_varlen_func
    assert module.flash_attn_with_kvcache is flash_attn_with_kvcache


@pytest.fixture
def tiny(local_kernel):
    """A function that builds the same random Qwen2 with the attention and dtype one asks for."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def build(attn_implementation: str, dtype: torch.dtype) -> Any:
        config = Qwen2Config(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
        # bfloat16 values in every dtype, so that the float32 model is the exact one.
        model = model.to(torch.bfloat16).to(dtype)
        model.set_attn_implementation(attn_implementation)
        return model

    return build


def logits_of_prompt_and_next(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The logits of a prompt, then of one more token with the cache, at every real position."""
    with torch.no_grad():
        before = None if mask is None else mask[:, :-1]
        prompt = model(tokens[:, :-1], attention_mask=before, use_cache=True)
        step = model(tokens[:, -1:], attention_mask=mask, past_key_values=prompt.past_key_values)
    logits = torch.cat([prompt.logits, step.logits], dim=1).double()
    return logits if mask is None else logits[mask.bool()]


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "left-padded"])
def test_transformers_gets_from_it_what_it_gets_from_sdpa(tiny, padded):
    tokens = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens) if padded else None
    if mask is not None:
        mask[0, :5] = mask[1, :2] = 0
    truth = logits_of_prompt_and_next(tiny("sdpa", torch.float32), tokens, mask)
    sdpa = logits_of_prompt_and_next(tiny("sdpa", torch.bfloat16), tokens, mask)

    seen: list[attention.GateCall] = []
    attention.watchers.append(seen.append)
    try:
        flash = logits_of_prompt_and_next(tiny("flash_attention_2", torch.bfloat16), tokens, mask)
    finally:
        attention.watchers.remove(seen.append)
    entry = "flash_attn_varlen_func" if padded else "flash_attn_func"
    assert [call.entry for call in seen] == [entry] * 4  # 2 layers, 2 forwards

    # bfloat16 alone puts sdpa this far from the truth; another order of sums may double it.
    distance = (sdpa - truth).abs().max()
    assert 0 < distance < 0.05 * truth.abs().max()
    assert (flash - truth).abs().max() <= 2 * distance


def test_transformers_in_float32_raises_the_gpus_error(tiny):
    model = tiny("flash_attention_2", torch.float32)
    with pytest.raises(RuntimeError) as caught:
        model(torch.tensor([[1, 2, 3]]))
    assert str(caught.value) == FLOAT32_MESSAGE


def test_transformers_trains_through_it(tiny):
    """The gradients of every weight, from packed sequences through the varlen function."""
    tokens = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    grads = {}
    for name, dtype in [
        ("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("flash_attention_2", torch.bfloat16),
    ]:  # fmt: skip
        model = tiny(name, dtype)
        model(
            tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)
        ).loss.backward()
        grads[name, dtype] = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    truth, sdpa, flash = grads.values()
    assert (sdpa - truth).norm() < 0.05 * truth.norm()
    assert (flash - truth).norm() <= 2 * (sdpa - truth).norm()
