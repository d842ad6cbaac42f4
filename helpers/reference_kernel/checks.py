"""What FlashAttention-2 refuses, in its order and in its words.

The rules are those of csrc/flash_attn/flash_api.cpp in https://github.com/Dao-AILab/flash-attention
at commit 0251105: mha_fwd, mha_varlen_fwd and mha_fwd_kvcache. All three go through

1. left out: "FlashAttention only supports Ampere GPUs or newer." The reference kernel runs anywhere
2. q is float16 or bfloat16; then k, then v has q's dtype
3. left out, for the same reason: "q must be on CUDA" and the like
4. the last dimension of q, k and v is contiguous
5. batch size, head size, head counts
6. the shapes of k and v, then what is particular to the function

and each raises RuntimeError at the first rule that is broken. An argument that is not implemented
raises NotImplementedError where upstream begins to look at it.
"""

import torch
from torch import Tensor


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> None:
    """The checks of `flash_attn_func`."""
    _dtypes(q, k, v)
    _last_dim_contiguous(q, k, v)
    batch_size, seqlen_q, num_heads, head_size = q.shape[:4]
    seqlen_k, num_heads_k = k.size(1), k.size(2)
    _sizes(batch_size, head_size, num_heads, num_heads_k)
    _check(not (softcap > 0 and dropout_p), "Softcapping does not support dropout for now")
    shape_q = (batch_size, seqlen_q, num_heads, head_size)
    shape_k = (batch_size, seqlen_k, num_heads_k, head_size)
    _shape("q", q, shape_q, "batch_size, seqlen_q, num_heads, head_size")
    _shape("k", k, shape_k, "batch_size, seqlen_k, num_heads_k, head_size")
    _shape("v", v, shape_k, "batch_size, seqlen_k, num_heads_k, head_size")
    _options(dropout_p, softcap, alibi_slopes, return_attn_probs)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None,
) -> None:
    """The checks of `flash_attn_varlen_func`."""
    _dtypes(q, k, v)
    _check(cu_seqlens_q.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
    _check(cu_seqlens_k.dtype == torch.int32, "cu_seqlens_k must have dtype int32")
    _not_implemented("block_table", block_table is not None)
    _last_dim_contiguous(q, k, v)
    _check(cu_seqlens_q.is_contiguous(), "cu_seqlens_q must be contiguous")
    _check(cu_seqlens_k.is_contiguous(), "cu_seqlens_k must be contiguous")
    batch_size = cu_seqlens_q.numel() - 1
    total_q, num_heads, head_size = q.shape[:3]
    total_k, num_heads_k = k.size(0), k.size(1)
    _check(not (softcap > 0 and dropout_p), "Softcapping does not support dropout for now")
    _sizes(batch_size, head_size, num_heads, num_heads_k)
    _shape("q", q, (total_q, num_heads, head_size), "total_q, num_heads, head_size")
    _shape("k", k, (total_k, num_heads_k, head_size), "total_k, num_heads_k, head_size")
    _shape("v", v, (total_k, num_heads_k, head_size), "total_k, num_heads_k, head_size")
    _shape("cu_seqlens_q", cu_seqlens_q, (batch_size + 1,), "batch_size + 1")
    _shape("cu_seqlens_k", cu_seqlens_k, (batch_size + 1,), "batch_size + 1")
    _options(dropout_p, softcap, alibi_slopes, return_attn_probs)


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> None:
    """The checks of `flash_attn_with_kvcache`."""
    _dtypes(q, k_cache, v_cache)
    _last_dim_contiguous(q, k_cache, v_cache)
    _not_implemented("block_table", block_table is not None)
    batch_size, seqlen_q, num_heads, head_size = (q.size(dim) for dim in range(4))
    batch_size_c, seqlen_k, num_heads_k = (k_cache.size(dim) for dim in range(3))
    # No multiple of 8 is asked for: this function pads the head size after its checks, not before.
    _sizes(batch_size, head_size, num_heads, num_heads_k, multiple=1)
    shape_q = (batch_size, seqlen_q, num_heads, head_size)
    shape_c = (batch_size_c, seqlen_k, num_heads_k, head_size)
    _shape("q", q, shape_q, "batch_size, seqlen_q, num_heads, head_size_og")
    _shape("kcache", k_cache, shape_c, "batch_size_c, seqlen_k, num_heads_k, head_size_og")
    _shape("vcache", v_cache, shape_c, "batch_size_c, seqlen_k, num_heads_k, head_size_og")
    if k is not None:
        if v is None:
            raise RuntimeError("If key is supplied, value must also be passed in")
        _check(cache_seqlens is not None, "If key is supplied, seqlens_k must also be passed in")
        _check(
            seqlen_q <= seqlen_k,
            "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
        )
        _check(k.dtype == q.dtype, "Key must have the same dtype as query")
        _check(v.dtype == q.dtype, "Value must have the same dtype as query")
        _check(k.stride(-1) == 1, "Key tensor must have contiguous last dimension")
        _check(v.stride(-1) == 1, "Value tensor must have contiguous last dimension")
        shape_new = (batch_size, k.size(1), num_heads_k, head_size)
        _shape("k", k, shape_new, "batch_size, seqlen_knew, num_heads_k, head_size_og")
        _shape("v", v, shape_new, "batch_size, seqlen_knew, num_heads_k, head_size_og")
    if isinstance(cache_seqlens, Tensor):
        _check(cache_seqlens.dtype == torch.int32, "seqlens_k must have dtype int32")
        _check(cache_seqlens.is_contiguous(), "seqlens_k must be contiguous")
        _shape("seqlens_k", cache_seqlens, (batch_size,), "batch_size")
    _not_implemented("cache_leftpad", cache_leftpad is not None)
    _not_implemented("rotary_cos", rotary_cos is not None)
    _not_implemented("rotary_sin", rotary_sin is not None)
    if cache_batch_idx is not None:
        _check(cache_batch_idx.is_contiguous(), "cache_batch_idx must be contiguous")
        _check(cache_batch_idx.dtype == torch.int32, "cache_batch_idx must have dtype int32")
    _check(num_splits <= 128, "num_splits > 128 not supported")
    _options(0.0, softcap, alibi_slopes, False)


def _check(condition: bool, message: str) -> None:
    """Upstream's TORCH_CHECK."""
    if not condition:
        raise RuntimeError(message)


def _shape(name: str, x: Tensor, shape: tuple[int, ...], dims: str) -> None:
    """Upstream's CHECK_SHAPE."""
    _check(x.shape == shape, f"{name} must have shape ({dims})")


def _dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check(
        q.dtype in (torch.float16, torch.bfloat16),
        "FlashAttention only support fp16 and bf16 data type",
    )
    _check(k.dtype == q.dtype, "query and key must have the same dtype")
    _check(v.dtype == q.dtype, "query and value must have the same dtype")


def _last_dim_contiguous(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Only an empty tensor gets this far with another stride: contiguous() returns it as it is.
    for x in (q, k, v):
        _check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")


def _sizes(batch_size: int, head_size: int, heads: int, heads_k: int, multiple: int = 8) -> None:
    _check(batch_size > 0, "batch size must be positive")
    _check(head_size <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(
        head_size % multiple == 0,
        "query, key, value, and out_ must have a head_size that is a multiple of 8",
    )
    _check(
        heads_k > 0 and heads % heads_k == 0,
        "Number of heads in key/value must divide number of heads in query",
    )


def _options(
    dropout_p: float, softcap: float, alibi_slopes: Tensor | None, return_attn_probs: bool
) -> None:
    # The whole text is PyTorch's, for a check to which upstream gave none.
    _check(
        dropout_p < 1,
        "Expected p_dropout < 1.f to be true, but got false.  (Could this error message be "
        "improved?  If so, please report an enhancement request to PyTorch.)",
    )
    _not_implemented("softcap", softcap > 0)
    _not_implemented("alibi_slopes", alibi_slopes is not None)
    _not_implemented("return_attn_probs with dropout_p > 0", return_attn_probs and dropout_p > 0)


def _not_implemented(argument: str, is_asked: bool) -> None:
    if is_asked:
        raise NotImplementedError(
            f"The reference kernel does not implement {argument}: leave it out, or use a GPU, "
            "where flash-attn supports it."
        )
