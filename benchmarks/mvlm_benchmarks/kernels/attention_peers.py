"""Peers of cross_attention. Each takes q (B, Lq, H, D), k and v as the op does and returns (B, Lq, H, D).

Libraries without packed or indexed keys get padded or copied keys. Padding and copying are timed; building masks and
indices is not.

Shape legend: B query sequences, B' key sequences, Lq and Lk their lengths, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.unavailable import Missing

Function = Callable[..., Tensor]


def math_backend() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def efficient_backend() -> Any:
    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)


def flash_backend() -> Any:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def cudnn_backend() -> Any:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def require_cuda(inputs: Inputs) -> None:
    """Raise Missing for tensors on a CPU."""
    if not inputs.leaves["q"].is_cuda:
        raise Missing("needs a CUDA device")


def _key_lengths(inputs: Inputs) -> Tensor | None:
    """Lengths of padded or packed keys, int32 (B',); None if all key sequences have full length."""
    if "cu_seqlens_k" in inputs.fixed:
        return inputs.fixed["cu_seqlens_k"].diff()
    return inputs.fixed.get("key_lengths")


def _valid_rows(lengths: Tensor, longest: int) -> Tensor:
    """Positions in a (B' * longest, ...) tensor that are not padding, int64, ascending."""
    valid = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B', longest), True = a key
    return valid.flatten().nonzero()[:, 0]


def _to_dense(inputs: Inputs) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """Returns a function that expands k or v to (B, Lk, H, D), and the mask of valid keys.

    The mask is bool (B, 1, 1, Lk), True = a valid key; None if all keys are valid.
    """
    fixed = inputs.fixed
    lengths = _key_lengths(inputs)
    if "key_index" in fixed:
        index = fixed["key_index"].long()
        return lambda x: x.index_select(0, index), None
    if lengths is None:
        return lambda x: x, None
    longest = fixed.get("max_len_k", inputs.leaves["k"].shape[1])
    mask = (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None, :]
    if "cu_seqlens_k" not in fixed:
        return lambda x: x, mask
    batch, rows = len(lengths), _valid_rows(lengths, longest)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, rows, x)
        return padded.unflatten(0, (batch, longest))

    return pad, mask


def _composition(inputs: Inputs, softmax: Callable[[Tensor], Tensor]) -> Function:
    dense, mask = _to_dense(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        # The output projection needs contiguous rows of H*D. A peer with another layout pays for the copy.
        return (softmax(scores) @ v).transpose(1, 2).contiguous()

    return attend


def eager(inputs: Inputs) -> Function:
    return _composition(inputs, lambda scores: scores.softmax(dim=-1))


def liger(inputs: Inputs) -> Function:
    """The eager composition with Liger's softmax kernel. Liger has no cross-attention."""
    from liger_kernel.ops import LigerSoftmaxFunction  # pyright: ignore[reportMissingImports]

    require_cuda(inputs)
    return _composition(inputs, LigerSoftmaxFunction.apply)


def sdpa(inputs: Inputs) -> Function:
    """torch SDPA, restricted to one backend by the peer's context. torch raises if the backend refuses the call."""
    dense, mask = _to_dense(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()

    return attend


def sdpa_cuda(inputs: Inputs) -> Function:
    require_cuda(inputs)
    return sdpa(inputs)


def flex(inputs: Inputs) -> Function:
    """Compiled FlexAttention. Lengths become a block mask, packed keys one long sequence with a document mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention: Any = torch.compile(flex_attention, dynamic=False)
    q, lengths = inputs.leaves["q"], _key_lengths(inputs)
    batch, len_q = q.shape[:2]
    if "cu_seqlens_k" in inputs.fixed:
        assert lengths is not None
        documents = torch.arange(batch, device=q.device)
        q_document, k_document = documents.repeat_interleave(len_q), documents.repeat_interleave(lengths)
        block_mask = create_block_mask(
            lambda b, h, i, j: q_document[i] == k_document[j], None, None, batch * len_q, len(k_document), q.device
        )

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q.flatten(0, 1), k, v))
            return (
                attention(q, k, v, block_mask=block_mask)[0].transpose(0, 1).contiguous().unflatten(0, (batch, len_q))
            )

        return packed
    dense, _ = _to_dense(inputs)
    block_mask = None
    if lengths is not None:
        len_k = inputs.leaves["k"].shape[1]
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], batch, None, len_q, len_k, q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        return attention(q, k, v, block_mask=block_mask).transpose(1, 2).contiguous()

    return attend


def xformers(inputs: Inputs) -> Function:
    """memory_efficient_attention. Lengths and packed keys become block-diagonal masks over one flat sequence."""
    from xformers.ops import memory_efficient_attention as attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha import attn_bias  # pyright: ignore[reportMissingImports]

    require_cuda(inputs)
    lengths = _key_lengths(inputs)
    if lengths is None:
        dense, _ = _to_dense(inputs)
        return lambda q, k, v: attention(q, dense(k), dense(v))
    batch, len_q = inputs.leaves["q"].shape[:2]
    lengths_q, lengths_k = [len_q] * batch, lengths.tolist()
    if "cu_seqlens_k" in inputs.fixed:
        bias = attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    else:
        len_k = inputs.leaves["k"].shape[1]
        bias = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(lengths_q, kv_padding=len_k, kv_seqlen=lengths_k)

    def flat(x: Tensor) -> Tensor:
        return (x.flatten(0, 1) if x.ndim == 4 else x)[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(flat(q), flat(k), flat(v), attn_bias=bias)[0].unflatten(0, (batch, len_q))

    return attend


def flash_attn_2(inputs: Inputs) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def flash_attn_4(inputs: Inputs) -> Function:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def _flash_attn(inputs: Inputs, dense_attention: Any, packed_attention: Any) -> Function:
    require_cuda(inputs)
    q, lengths = inputs.leaves["q"], _key_lengths(inputs)
    if lengths is None:
        dense, _ = _to_dense(inputs)
        return lambda q, k, v: _output(dense_attention(q, dense(k), dense(v)))
    batch, len_q = q.shape[:2]
    longest = inputs.fixed.get("max_len_k", inputs.leaves["k"].shape[1])
    arguments = {
        "cu_seqlens_q": torch.arange(batch + 1, device=q.device, dtype=torch.int32) * len_q,
        "cu_seqlens_k": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen_q": len_q,
        "max_seqlen_k": longest,
    }
    rows = None if "cu_seqlens_k" in inputs.fixed else _valid_rows(lengths, longest)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rows is not None:
            k, v = (x.flatten(0, 1).index_select(0, rows) for x in (k, v))
        return _output(packed_attention(q.flatten(0, 1), k, v, **arguments)).unflatten(0, (batch, len_q))

    return attend


def _output(result: Any) -> Tensor:
    """The output alone; flash-attn 4 returns (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result
