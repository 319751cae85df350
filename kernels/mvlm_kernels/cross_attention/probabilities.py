"""Attention probabilities, for pictures of what a query attends to; see :func:`attention_probabilities`."""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.cross_attention.arguments import as_autocast, cap_of, check_arguments, check_values, scale_of
from mvlm_kernels.cross_attention.reference import pack_key_mask, reference_probabilities
from mvlm_kernels.refusals import FLOAT64, Refusal


def _explain(q: Tensor, k: Tensor, lse: Tensor | None = None, **options: Any) -> tuple[Refusal, ...]:
    q, k = as_autocast(q, k)
    _checked(q, k, lse, **options)
    return _reasons(q)


@dispatch.explained_by(_explain)
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
    softcap: float | None = None,
) -> Tensor:
    """Probabilities ``softmax_j(scale * q[b, i, h] . k[r, j, h])`` of :func:`mvlm_kernels.cross_attention`.

    The result has no gradient. Either side may have any length.

    Args:
        q, k: as in ``cross_attention``: (B, Lq, H, D) and (B', Lk, H, D), or packed. Floating, of one dtype;
            autocast casts them first.
        lse: natural log-sum-exp of the scores, from ``cross_attention(..., return_lse=True)``: (B, H, Lq), or packed
            (H, Tq). With it every score is computed once, without it twice.
        key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale: as in ``cross_attention``.
        softcap: as in ``cross_attention``. A dropout there changes neither lse nor probabilities.
        max_len_q, max_len_k: upper bound of the sequence lengths of a packed side, needed for each: it is the size of
            the result. Sequences past it are a ValueError on the CPU and NaN on a GPU.

    Returns:
        (B, H, Lq, Lk), float64 for float64 and else float32; Lq and Lk are the bounds of packed sides. Rows of real
        queries add up to 1. Keys that do not exist, queries past a sequence's end and queries without keys give zeros.
        float32 products are split into three of TF32 on a GPU, which errs by less than 1e-6.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, and for a packed side without its bound.
    """
    q, k = as_autocast(q, k)
    args = _checked(
        q, k, lse, key_lengths=key_lengths, key_mask=key_mask, key_index=key_index, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, scale=scale, max_len_q=max_len_q, max_len_k=max_len_k,
        softcap=softcap,
    )  # fmt: skip
    with torch.no_grad():
        return _op(q.detach(), k.detach(), None if lse is None else lse.detach(), *args)


def _checked(
    q: Tensor, k: Tensor, lse: Tensor | None, *, key_lengths: Tensor | None = None, key_mask: Tensor | None = None,
    key_index: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    scale: float | None = None, max_len_q: int | None = None, max_len_k: int | None = None,
    softcap: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Check the arguments, and return those of the op after lse."""
    check_arguments(q, k, k, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    for side, cu_seqlens, bound in (("q", cu_seqlens_q, max_len_q), ("k", cu_seqlens_k, max_len_k)):
        if cu_seqlens is not None and bound is None:
            raise ValueError(
                f"max_len_{side} must be given where {side} is packed: it is a size of the result; got None"
            )
    if lse is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        if lse.shape != shape or lse.dtype != _dtype(q) or lse.device != q.device:
            raise ValueError(
                f"lse must be {_dtype(q)} of shape {tuple(shape)} on {q.device}, got {lse.dtype} of shape "
                f"{tuple(lse.shape)} on {lse.device}"
            )
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = pack_key_mask(key_mask)
    len_q = q.shape[1] if max_len_q is None else max_len_q
    len_k = k.shape[1] if max_len_k is None else max_len_k
    return (
        key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale_of(scale, q.shape[-1]), len_q, len_k,
        cap_of(softcap),
    )  # fmt: skip


def _dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _reasons(q: Tensor) -> tuple[Refusal, ...]:
    found = dispatch.device_reasons(q.device)
    return (*found, FLOAT64) if q.is_cuda and q.dtype == torch.float64 else found


def _implementation(q: Tensor, k: Tensor, lse: Tensor | None, *args: Any) -> Tensor:
    lengths, _, index, cu_q, cu_k, _, len_q, len_k = args[:8]
    if dispatch.checks_values(q.device):
        check_values(q, k, lengths, index, cu_q, cu_k, (None, None), len_q, len_k)
    if dispatch.choose(_reasons(q)) == "triton":
        from mvlm_kernels.cross_attention import probabilities_kernel

        return probabilities_kernel.launch(q, k, lse, *args)
    return reference_probabilities(q, k, lse, *args)


def _fake(q: Tensor, k: Tensor, lse: Tensor | None, *args: Any) -> Tensor:
    _, _, _, cu_q, _, _, len_q, len_k = args[:8]
    seqs = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    return torch.empty((seqs, q.shape[-2], len_q, len_k), dtype=_dtype(q), device=q.device)


_op = registration.define(
    "attention_probabilities(Tensor q, Tensor k, Tensor? lse, Tensor? key_lengths, Tensor? key_mask, "
    "Tensor? key_index, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, SymInt max_len_q, SymInt max_len_k, "
    "float softcap=0.0) -> Tensor",
    _implementation,
    _fake,
)
