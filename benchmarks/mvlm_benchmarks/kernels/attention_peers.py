"""Peers of cross_attention: each takes q (B, Lq, H, D), k and v as the op does, and returns the op's (B, Lq, H, D).

Libraries that know no packed or indexed keys are fed as their users feed them: padded into a dense batch, or copied by
index. Those copies are part of what is timed; the masks and indices for them are made once, by the builder.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.reasons import Missing

Function = Callable[..., Tensor]


def math_backend() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def efficient_backend() -> Any:
    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)


def flash_backend() -> Any:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def cudnn_backend() -> Any:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def _need_cuda(inputs: Inputs) -> None:
    if not inputs.leaves["q"].is_cuda:
        raise Missing("needs a CUDA device")


def _key_lengths(inputs: Inputs) -> Tensor | None:
    """(B',) int32 lengths of padded or packed keys; None where every row is full."""
    if "cu_seqlens_k" in inputs.fixed:
        return inputs.fixed["cu_seqlens_k"].diff()
    return inputs.fixed.get("key_lengths")


def _rows_that_exist(lengths: Tensor, longest: int) -> Tensor:
    """Indices into (B' * longest) of the rows within lengths, in order."""
    exists = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return exists.flatten().nonzero()[:, 0]


def _dense(inputs: Inputs) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """How to make k or v one dense row (B, Lk, H, D) for each of q's, and which keys exist: (B, 1, 1, Lk) or None."""
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
    batch, rows = len(lengths), _rows_that_exist(lengths, longest)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, rows, x)
        return padded.unflatten(0, (batch, longest))

    return pad, mask


def _composition(inputs: Inputs, softmax: Callable[[Tensor], Tensor]) -> Function:
    dense, mask = _dense(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        # The output projection reads rows of H*D: a layout that has to be copied for it is copied here.
        return (softmax(scores) @ v).transpose(1, 2).contiguous()

    return attend


def eager(inputs: Inputs) -> Function:
    return _composition(inputs, lambda scores: scores.softmax(dim=-1))


def liger(inputs: Inputs) -> Function:
    """Liger has no cross-attention; its softmax kernel replaces torch's in the composition."""
    from liger_kernel.ops import LigerSoftmaxFunction  # pyright: ignore[reportMissingImports]

    _need_cuda(inputs)
    return _composition(inputs, LigerSoftmaxFunction.apply)


def sdpa(inputs: Inputs) -> Function:
    """The backend is the one whose context is entered; where it does not take a call, torch raises."""
    dense, mask = _dense(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()

    return attend


def sdpa_cuda(inputs: Inputs) -> Function:
    _need_cuda(inputs)
    return sdpa(inputs)


def flex(inputs: Inputs) -> Function:
    """Compiled FlexAttention: lengths as a block mask; packed keys as one long sequence with a document mask."""
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
    dense, _ = _dense(inputs)
    block_mask = None
    if lengths is not None:
        len_k = inputs.leaves["k"].shape[1]
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], batch, None, len_q, len_k, q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, dense(k), dense(v)))
        return attention(q, k, v, block_mask=block_mask).transpose(1, 2).contiguous()

    return attend


def xformers(inputs: Inputs) -> Function:
    """memory_efficient_attention; lengths and packed keys as block-diagonal masks over one flat sequence."""
    from xformers.ops import memory_efficient_attention as attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha import attn_bias  # pyright: ignore[reportMissingImports]

    _need_cuda(inputs)
    lengths = _key_lengths(inputs)
    if lengths is None:
        dense, _ = _dense(inputs)
        return lambda q, k, v: attention(q, dense(k), dense(v))
    batch, len_q = inputs.leaves["q"].shape[:2]
    rows_q, rows_k = [len_q] * batch, lengths.tolist()
    if "cu_seqlens_k" in inputs.fixed:
        bias = attn_bias.BlockDiagonalMask.from_seqlens(rows_q, rows_k)
    else:
        len_k = inputs.leaves["k"].shape[1]
        bias = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(rows_q, kv_padding=len_k, kv_seqlen=rows_k)

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
    _need_cuda(inputs)
    q, lengths = inputs.leaves["q"], _key_lengths(inputs)
    if lengths is None:
        dense, _ = _dense(inputs)
        return lambda q, k, v: _first(dense_attention(q, dense(k), dense(v)))
    batch, len_q = q.shape[:2]
    longest = inputs.fixed.get("max_len_k", inputs.leaves["k"].shape[1])
    sides = {
        "cu_seqlens_q": torch.arange(batch + 1, device=q.device, dtype=torch.int32) * len_q,
        "cu_seqlens_k": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen_q": len_q,
        "max_seqlen_k": longest,
    }
    rows = None if "cu_seqlens_k" in inputs.fixed else _rows_that_exist(lengths, longest)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rows is not None:
            k, v = (x.flatten(0, 1).index_select(0, rows) for x in (k, v))
        return _first(packed_attention(q.flatten(0, 1), k, v, **sides)).unflatten(0, (batch, len_q))

    return attend


def _first(out: Any) -> Tensor:
    """flash-attn 4 returns the log-sum-exp beside the output."""
    return out[0] if isinstance(out, tuple) else out
