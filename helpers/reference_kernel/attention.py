"""FlashAttention-2's three functions, on `torch.nn.functional.scaled_dot_product_attention`.

The signatures, and what happens before the checks, are those of flash_attn/flash_attn_interface.py
in https://github.com/Dao-AILab/flash-attention at commit 0251105; the checks are in `checks.py`.
`deterministic`, `num_splits` and `rotary_interleaved` are accepted and change nothing: the first
two only tell a GPU how to work, the third only matters with rotary_cos, which is refused.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.reference_kernel import checks


class GateCall(NamedTuple):
    """What arrives at the function `entry`, before any check."""

    entry: str
    q: Tensor
    k: Tensor
    v: Tensor


# Each is called with the GateCall of every call, also of one that then fails a check.
watchers: list[Callable[[GateCall], None]] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention over a batch of sequences of one length.

    q is (batch, seqlen_q, heads, head_size); k and v are (batch, seqlen_k, heads_k, head_size), and
    heads is a multiple of heads_k. Query i sees the keys from i + seqlen_k - seqlen_q - left to
    i + seqlen_k - seqlen_q + right, with (left, right) = window_size; a negative side is unlimited,
    and `causal` makes right 0. A query that sees no key gets zeros. The scale of the scores is
    1 / sqrt(head_size) unless `softmax_scale` is given.

    Returns q's shape and dtype. With `return_attn_probs` also softmax_lse, the float32 logsumexp of
    each query's scores, (batch, heads, seqlen_q), without gradient and +inf for a query that sees
    no key, and an empty tensor, as upstream does where there is no dropout.

    RuntimeError: a check failed. NotImplementedError: `softcap`, `alibi_slopes`.
    """
    _tell_watchers("flash_attn_func", q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    head_size = q.size(3)
    q, k, v = (_pad_head_size(x, head_size) for x in (q, k, v))
    checks.dense(q, k, v, dropout_p, softcap, alibi_slopes, return_attn_probs)

    rule = _Rule(scale, causal, window_size, dropout_p)
    out = _attend(q, k, v, rule)[..., :head_size]
    return (out, _logsumexp(q, k, rule), q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention over sequences of different lengths, laid end to end without padding.

    q is (total_q, heads, head_size); k and v are (total_k, heads_k, head_size). Sequence b owns the
    rows from cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q, and likewise of k and v; both are int32
    of shape (batch + 1,). max_seqlen_q and max_seqlen_k are the longest lengths. Within a sequence
    the rules are those of `flash_attn_func`.

    Returns q's shape and dtype, zeros in rows that no sequence owns; softmax_lse is
    (heads, total_q).

    RuntimeError: a check failed. ValueError: cu_seqlens or max_seqlen contradict the tensors, where
    upstream would use memory that nobody wrote. NotImplementedError: `softcap`, `alibi_slopes`,
    `block_table`.
    """
    _tell_watchers("flash_attn_varlen_func", q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    head_size = q.size(2)
    q, k, v = (_pad_head_size(x, head_size) for x in (q, k, v))
    checks.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softcap, alibi_slopes, return_attn_probs,
        block_table,
    )  # fmt: skip
    lengths_q = _lengths("q", cu_seqlens_q, q.size(0), max_seqlen_q)
    lengths_k = _lengths("k", cu_seqlens_k, k.size(0), max_seqlen_k)

    rule = _Rule(scale, causal, window_size, dropout_p)
    # Sequences of one length are a dense batch: one call of SDPA instead of one for each.
    rows = len(lengths_q) if len(set(lengths_q)) == len(set(lengths_k)) == 1 else 1
    qs, ks, vs = _split(q, lengths_q, rows), _split(k, lengths_k, rows), _split(v, lengths_k, rows)
    outs = [_attend(*part, rule).flatten(0, 1) for part in zip(qs, ks, vs, strict=True)]
    unowned = q.size(0) - sum(lengths_q)
    if unowned:
        outs.append(q.new_zeros(unowned, *q.shape[1:]))
    out = (outs[0] if len(outs) == 1 else torch.cat(outs))[..., :head_size]
    if not return_attn_probs:
        return out
    lses = [_logsumexp(*part, rule).transpose(0, 1).flatten(1) for part in zip(qs, ks, strict=True)]
    lse = F.pad(torch.cat(lses, dim=1), [0, unowned], value=torch.inf)
    return out, lse, q.new_empty(0)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a cache of keys and values, without backward.

    q is (batch, seqlen_q, heads, head_size); k_cache and v_cache are (batch_cache, seqlen_cache,
    heads_k, head_size). Sequence b uses row cache_batch_idx[b] (default: b) of the cache, up to
    cache_seqlens[b] (default: all of it; int, or int32 of shape (batch,)). k and v, (batch,
    seqlen_new, heads_k, head_size), are first written into the cache, in place, from
    cache_seqlens[b] on. Within a sequence the rules are those of `flash_attn_func`.

    Returns q's shape and dtype; with `return_softmax_lse` also softmax_lse as there.

    AssertionError, RuntimeError: a check failed. ValueError: lengths or rows do not fit the cache,
    or v came without k. NotImplementedError: rotary embedding, `cache_leftpad`, `block_table`,
    `softcap`, `alibi_slopes`.
    """
    _tell_watchers("flash_attn_with_kvcache", q, k_cache, v_cache)
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    q = _maybe_contiguous(q)
    k, v, cache_batch_idx = (
        x if x is None else _maybe_contiguous(x) for x in (k, v, cache_batch_idx)
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    checks.kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, softcap, alibi_slopes, num_splits,
    )  # fmt: skip
    batch_size, capacity = len(q), k_cache.size(1)
    rows = list(range(batch_size)) if cache_batch_idx is None else cache_batch_idx.tolist()
    if len(rows) != batch_size or min(rows) < 0 or max(rows) >= len(k_cache):
        raise ValueError(
            f"The {batch_size} sequences would use the rows {rows} of a cache that has "
            f"{len(k_cache)}: pass one existing row for each in cache_batch_idx."
        )
    if k is None and v is not None:
        raise ValueError("v was given without k: pass both to extend the cache, or neither.")
    if cache_seqlens is None:
        cache_seqlens = capacity
    starts = (
        [cache_seqlens] * batch_size if isinstance(cache_seqlens, int) else cache_seqlens.tolist()
    )
    ends = [start + (0 if k is None else k.size(1)) for start in starts]
    if min(starts) < 0 or max(ends) > capacity:
        raise ValueError(
            f"The sequences would end at {ends} in a cache of {capacity} tokens: pass smaller "
            "cache_seqlens, or a larger cache."
        )
    if k is not None and v is not None:
        for b, row in enumerate(rows):
            k_cache[row, starts[b] : ends[b]] = k[b]
            v_cache[row, starts[b] : ends[b]] = v[b]

    rule = _Rule(scale, causal, window_size)
    qs, ks = q.split(1), [k_cache[None, row, :end] for row, end in zip(rows, ends, strict=True)]
    vs = [v_cache[None, row, :end] for row, end in zip(rows, ends, strict=True)]
    out = torch.cat([_attend(*part, rule) for part in zip(qs, ks, vs, strict=True)])
    if not return_softmax_lse:
        return out
    return out, torch.cat([_logsumexp(*part, rule) for part in zip(qs, ks, strict=True)])


class _Rule(NamedTuple):
    """Which keys a query sees, and what happens to its scores."""

    scale: float
    causal: bool
    window_size: tuple[int, int]
    dropout_p: float = 0.0

    def limits(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """How many keys a query sees to the left and to the right of its own position.

        Never more than there can be: seqlen_k - 1 and seqlen_q - 1. This is the documented formula;
        upstream's code also takes a right window of seqlen_k or more for unlimited, which makes a
        difference where seqlen_q > seqlen_k.
        """
        left, right = self.window_size
        if self.causal:
            right = 0
        most_left, most_right = k.size(1) - 1, q.size(1) - 1
        return (
            min(left, most_left) if left >= 0 else most_left,
            min(right, most_right) if right >= 0 else most_right,
        )

    def mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """True where query i sees key j, (seqlen_q, seqlen_k); None if every query sees all."""
        seqlen_q, seqlen_k = q.size(1), k.size(1)
        left, right = self.limits(q, k)
        if (left, right) == (seqlen_k - 1, seqlen_q - 1):
            return None
        own = seqlen_k - seqlen_q  # the diagonal on which a query meets its own position
        full = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        return full.tril(own + right).triu(own - left)


def _attend(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    """Dense attention, (batch, seqlen, heads, head_size) in and out."""
    # SDPA's own causal mask is aligned to the top left, which is the same in a square.
    is_causal = q.size(1) == k.size(1) and rule.limits(q, k) == (k.size(1) - 1, 0)
    # Autocast casts what SDPA gets, but not what FlashAttention's operators get.
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if is_causal else rule.mask(q, k),
            dropout_p=rule.dropout_p,
            is_causal=is_causal,
            scale=rule.scale,
            enable_gqa=q.size(2) != k.size(2),
        )
    return out.transpose(1, 2).contiguous()


@torch.no_grad()
def _logsumexp(q: Tensor, k: Tensor, rule: _Rule) -> Tensor:
    """The logsumexp of each query's scores, float32 (batch, heads, seqlen_q)."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    with torch.autocast(q.device.type, enabled=False):
        scores = rule.scale * (q.float().permute(0, 2, 1, 3) @ k.float().permute(0, 2, 3, 1))
    if (mask := rule.mask(q, k)) is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _pad_head_size(x: Tensor, head_size: int) -> Tensor:
    """Zeros up to a multiple of 8: they change neither the scores nor the output's first values."""
    return _maybe_contiguous(F.pad(x, [0, 8 - head_size % 8]) if head_size % 8 else x)


def _maybe_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _lengths(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int | Tensor) -> list[int]:
    """The length of each sequence, from cumulative lengths."""
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    if edges[0] != 0 or min(lengths) < 0 or edges[-1] > total:
        raise ValueError(
            f"cu_seqlens_{name} is {edges}, but it must start at 0, never fall and end within the "
            f"{total} rows of {name}: pass the cumulative sequence lengths."
        )
    if max(lengths) > int(max_seqlen):
        raise ValueError(
            f"max_seqlen_{name} is {int(max_seqlen)}, but cu_seqlens_{name} holds a sequence of "
            f"{max(lengths)}: pass the longest length."
        )
    return lengths


def _split(x: Tensor, lengths: list[int], rows: int) -> list[Tensor]:
    """(total, heads, head_size) as one batch of `rows` sequences, or as a batch of 1 for each."""
    total = sum(lengths)
    parts = x[:total].split([total] if rows > 1 else lengths)
    return [part.unflatten(0, (rows, len(part) // rows)) for part in parts]


def _tell_watchers(entry: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if watchers:
        call = GateCall(entry, q, k, v)
        for watch in watchers:
            watch(call)
