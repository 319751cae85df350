"""Attention probabilities, for pictures of what a query attends to; see :func:`attention_probabilities`."""

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import as_autocast, check_arguments, check_values, scale_of
from mvlm_kernels.cross_attention.reference import reference_probabilities


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    max_len_q: int | None = None,
    max_len_k: int | None = None,
) -> Tensor:
    """Probabilities ``softmax_j(scale * q[b, i, h] . k[r, j, h])`` of :func:`mvlm_kernels.cross_attention`.

    Plain torch on every device, without gradient: for pictures of what a query attends to. Either side may have any
    length.

    Args:
        q, k: as in ``cross_attention``: (B, Lq, H, D) and (B', Lk, H, D), or packed. Floating, of one dtype;
            autocast casts them first.
        lse: natural log-sum-exp of the scores, from ``cross_attention(..., return_lse=True)``: (B, H, Lq), or packed
            (H, Tq).
        key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale: as in ``cross_attention``. A dropout there
            changes neither lse nor probabilities.
        max_len_q, max_len_k: upper bound of the sequence lengths of a packed side, needed for each: it is the size of
            the result. Sequences past it are a ValueError on the CPU and NaN on a GPU.

    Returns:
        (B, H, Lq, Lk), float64 for float64 and else float32; Lq and Lk are the bounds of packed sides. Rows of real
        queries add up to 1. Keys that do not exist, queries past a sequence's end and queries without keys give zeros.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, and for a packed side without its bound.
    """
    q, k = as_autocast(q, k)
    check_arguments(q, k, k, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    for side, cu_seqlens, bound in (("q", cu_seqlens_q, max_len_q), ("k", cu_seqlens_k, max_len_k)):
        if cu_seqlens is not None and bound is None:
            raise ValueError(
                f"max_len_{side} must be given where {side} is packed: it is a size of the result; got None"
            )
    if lse is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        dtype = torch.promote_types(q.dtype, torch.float32)
        if lse.shape != shape or lse.dtype != dtype or lse.device != q.device:
            raise ValueError(
                f"lse must be {dtype} of shape {tuple(shape)} on {q.device}, got {lse.dtype} of shape "
                f"{tuple(lse.shape)} on {lse.device}"
            )
    len_q = q.shape[1] if max_len_q is None else max_len_q
    len_k = k.shape[1] if max_len_k is None else max_len_k
    if dispatch.checks_values(q.device):
        check_values(q, k, key_lengths, key_index, cu_seqlens_q, cu_seqlens_k, (None, None), len_q, len_k)
    sides = key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k
    with torch.no_grad():
        return reference_probabilities(q, k, lse, *sides, scale_of(scale, q.shape[-1]), len_q, len_k)
