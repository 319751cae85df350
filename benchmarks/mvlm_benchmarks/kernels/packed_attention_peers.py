"""Peers of cross_attention that take packed sequences.

Layouts are converted as in :mod:`mvlm_benchmarks.kernels.attention_peers`.
"""

from typing import Any

from torch import Tensor

from mvlm_benchmarks.kernels.attention_peers import Function, Side, require_cuda
from mvlm_kernels.case import Inputs


def xformers(inputs: Inputs) -> Function:
    """memory_efficient_attention. Lengths and packed keys become block-diagonal masks over one flat sequence."""
    from xformers.ops import memory_efficient_attention as attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha import attn_bias  # pyright: ignore[reportMissingImports]

    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    if not queries.ragged and not keys.ragged:
        return lambda q, k, v: attention(q, keys.padded(k), keys.padded(v))
    lengths_q, lengths_k = queries.lengths.tolist(), keys.lengths.tolist()
    if keys.is_packed or queries.is_packed:
        bias = attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[None] for x in (queries.packed(q), keys.packed(k), keys.packed(v)))
            return queries.from_packed(attention(q, k, v, attn_bias=bias)[0])

        return packed
    bias = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(
        lengths_q, kv_padding=keys.longest, kv_seqlen=lengths_k
    )  # fmt: skip

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (keys.padded(x).flatten(0, 1)[None] for x in (k, v))
        return queries.from_packed(attention(queries.packed(q)[None], k, v, attn_bias=bias)[0])

    return padded


def flash_attn_2(inputs: Inputs) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def flash_attn_4(inputs: Inputs) -> Function:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def _flash_attn(inputs: Inputs, dense_attention: Any, packed_attention: Any) -> Function:
    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    if not queries.ragged and not keys.ragged:
        return lambda q, k, v: _output(dense_attention(q, keys.padded(k), keys.padded(v)))
    arguments = {
        "cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens, "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
    }  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return queries.from_packed(
            _output(packed_attention(queries.packed(q), keys.packed(k), keys.packed(v), **arguments))
        )

    return attend


def _output(result: Any) -> Tensor:
    """The output alone; flash-attn 4 returns (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result


def varlen(inputs: Inputs) -> Function:
    """torch's own attention of packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    bounds = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = varlen_attn(queries.packed(q), keys.packed(k), keys.packed(v), *bounds)
        return queries.from_packed(out)

    return attend
