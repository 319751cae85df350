"""Cross-attention with one short side, forward and backward: ``torch.ops.mvlm_kernels.cross_attention``."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvlm_kernels import dispatch, registration
from mvlm_kernels.cross_attention import cpu
from mvlm_kernels.cross_attention.bounds import (
    HEAD_WIDTHS,
    LONGEST_SHORT_SIDE,
    bucket,
    check_arguments,
    check_values,
    longest_rows,
    short_side,
)
from mvlm_kernels.cross_attention.reference import pack_key_mask, reference_backward, reference_forward, sdpa

__all__ = ["cross_attention", "pack_key_mask"]


def _implementation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    key_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    max_len_q: int,
    max_len_k: int,
) -> tuple[Tensor, Tensor]:
    if dispatch.checks_values(q.device):
        check_values(q, k, key_lengths, key_index, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    args = (q, k, v, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale)
    if dispatch.choose(_reasons(q, max_len_q, max_len_k)) == "triton":
        from mvlm_kernels.cross_attention import triton

        return triton.forward(*args, max_len_q, max_len_k)
    return reference_forward(*args)


def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    packed = q.dim() == 3
    lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(
        lse_shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )


def _backward_implementation(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    key_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    max_len_q: int,
    max_len_k: int,
    need_dq: bool,
    need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sides = (key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale)
    if dispatch.choose(_reasons(q, max_len_q, max_len_k)) == "triton":
        from mvlm_kernels.cross_attention import triton

        grads = triton.backward(grad, q, k, v, out, lse, *sides, max_len_q, max_len_k, need_dq, need_dkv)
    else:
        grads = reference_backward(grad, q, k, v, lse, *sides)
    # An op returns tensors: what is not needed is an empty one.
    dq, dk, dv = grads
    return (
        dq if dq is not None and need_dq else q.new_empty(0),
        dk if dk is not None and need_dkv else q.new_empty(0),
        dv if dv is not None and need_dkv else q.new_empty(0),
    )


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dq, need_dkv = args[-2:]
    none = torch.Size([0])
    return (
        torch.empty(q.shape if need_dq else none, dtype=q.dtype, device=q.device),
        torch.empty(k.shape if need_dkv else none, dtype=k.dtype, device=k.device),
        torch.empty(k.shape if need_dkv else none, dtype=k.dtype, device=k.device),
    )


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, *args)
        *sides, ctx.scale, ctx.max_len_q, ctx.max_len_k = args
        # Delta needs the output only where the short side is the queries: elsewhere it is not kept for the backward.
        kept = out if short_side(ctx.max_len_q, ctx.max_len_k) == "q" else None
        ctx.save_for_backward(q, k, v, kept, lse, *sides)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grads[0] is None:
            return (None,) * 12
        need_dq, need_dk, need_dv = ctx.needs_input_grad[1:4]
        need_dkv = need_dk or need_dv
        backward = registration.backward_of(_BACKWARD_OP, _backward_implementation, grads[0])
        dq, dk, dv = backward(grads[0], *ctx.saved_tensors, ctx.scale, ctx.max_len_q, ctx.max_len_k, need_dq, need_dkv)
        return (None, dq if need_dq else None, dk if need_dk else None, dv if need_dv else None) + (None,) * 8


_DIRECT = registration.direct(_CrossAttention, _implementation)
_SIDES = (
    "Tensor? key_lengths, Tensor? key_mask, Tensor? key_index, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "float scale, SymInt max_len_q, SymInt max_len_k"
)
_OP = registration.define(
    f"cross_attention(Tensor q, Tensor k, Tensor v, {_SIDES}) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _CrossAttention,
)
_BACKWARD_OP = registration.define(
    f"cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, {_SIDES}, "
    "bool need_dq, bool need_dkv) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)


def _reasons(q: Tensor, max_len_q: int, max_len_k: int) -> tuple[str, ...]:
    """Every reason against the fused kernels, from what the host knows."""
    reasons = dispatch.device_reasons(q.device)
    side = short_side(max_len_q, max_len_k)
    if side is None:
        return (*reasons, _too_long(max_len_q, max_len_k))
    if q.is_cuda and not reasons:
        short = bucket(max_len_k if side == "kv" else max_len_q)
        return _type_reasons(q.dtype, q.shape[-1], short, dispatch.arch(q.device), _tf32(q.dtype))
    return reasons


def _too_long(max_len_q: int, max_len_k: int) -> str:
    return f"both sides are longer than {LONGEST_SHORT_SIDE} ({max_len_q} queries, {max_len_k} keys): SDPA runs"


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and dispatch.tf32_allowed()


@functools.cache
def _type_reasons(dtype: torch.dtype, width: int, rows: int, arch: int, tf32: bool) -> tuple[str, ...]:
    """Reasons that hold on a GPU only: the interpreter takes every type."""
    if dtype == torch.float64:
        return ("float64 has no kernel on a GPU: SDPA runs, or the reference on packed rows",)
    if dtype == torch.float32 and not tf32:
        return ('float32 runs in TF32, and float32_matmul_precision is "highest": SDPA or the reference runs',)
    from mvlm_kernels.cross_attention.plan import has_tiles

    if not has_tiles(dtype, width, rows, arch):
        return (f"no tile of {dtype} at width {width} and {rows} rows fits this GPU: SDPA or the reference runs",)
    return ()


def _takes_sdpa(q: Tensor, short: int) -> bool:
    width = next(w for w in HEAD_WIDTHS if w == q.shape[-1])  # a plain int, also where a compiler traces
    return _gpu_takes_sdpa(q.device, q.dtype, width, bucket(short))


@torch.compiler.assume_constant_result
def _gpu_takes_sdpa(device: torch.device, dtype: torch.dtype, width: int, rows: int) -> bool:
    """Whether a dense call on this GPU goes around the kernels; settled while tracing, so SDPA itself is traced."""
    reasons = dispatch.device_reasons(device)
    if not reasons:
        reasons = _type_reasons(dtype, width, rows, dispatch.arch(device), _tf32(dtype))
    return dispatch.choose(reasons) == "torch"


def _composes(q: Tensor, max_len_q: int, max_len_k: int) -> bool:
    """Whether the CPU's composition runs: it reads lengths, so not where a compiler traces or tensors are fake."""
    return (
        q.device.type == "cpu"
        and type(q) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and dispatch.choose(_reasons(q, max_len_q, max_len_k)) == "torch"
    )


def _explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    max_len_q: int | None = None,
    max_len_k: int | None = None,
) -> tuple[str, ...]:
    q, k, v = _autocast(q, k, v)
    check_arguments(q, k, v, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    return _reasons(q, *longest_rows(q, k, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k))


@dispatch.explained_by(_explain)
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Softmax attention of q over k and v where one side is short (text, at most 128 rows) and the other is image
    patches.

    ``out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[r, j, h]) v[r, j, h]`` with ``r = key_index[b]``, or b
    without it.

    Shapes: B query sequences, B' key sequences, L rows each, T packed rows, H heads, D head width (32, 64, 80, 96 or
    128).

    q: (B, Lq, H, D), or packed (Tq, H, D) with ``cu_seqlens_q`` (B + 1,). k, v: (B', Lk, H, D), or packed (Tk, H, D)
    with ``cu_seqlens_k`` (B' + 1,). Either side alone may be packed. key_lengths: (B',) int; keys past it do not exist:
    they may hold NaN and get zero gradients. key_mask: (B', Lk) bool, True = the key exists, or the int64 words that
    :func:`pack_key_mask` makes of it. With both, a key exists
        where both say so. A row without any key gives zeros, and zero gradients.
    key_index: (B,) int; query sequence b reads K/V sequence key_index[b] in place. Gradients of a sequence that several
    read add up
        in a fixed order. Without it B' = B.
    scale: ``D ** -0.5`` by default. max_len_q, max_len_k: for a packed side only, an upper bound of its sequences'
    lengths, from which tiles are chosen. Without one
        the shorter side counts as text, at most 128 long. Longer sequences than that are a ValueError on the CPU, NaN
        on a GPU, where reading the lengths would be a sync. Rows behind the last sequence come out as zeros.

    Returns the output, contiguous, in q's shape and dtype. bfloat16, float16 and float32 (TF32 on a GPU) accumulate in
    float32; float64 runs on the reference. On the CPU an eager call is composed of torch ops. Under autocast all three
    are cast first. Where both sides are longer than 128 this is SDPA, as :func:`mvlm_kernels.explain` will say. Raises
    ValueError on shapes, dtypes or devices that do not fit; on values of lengths and indices only for CPU tensors or
    with MVLM_KERNELS_DEBUG=1.
    """
    q, k, v = _autocast(q, k, v)
    check_arguments(q, k, v, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    len_q, len_k = longest_rows(q, k, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    side = short_side(len_q, len_k)
    if side is None:
        dispatch.refuse_if_forced(_too_long(len_q, len_k))
    elif _composes(q, len_q, len_k):
        check_values(q, k, key_lengths, key_index, cu_seqlens_q, cu_seqlens_k, len_q, len_k)
        return cpu.attend(q, k, v, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if side is None or (q.is_cuda and _takes_sdpa(q, len_k if side == "kv" else len_q)):
            return sdpa(q, k, v, key_lengths, key_mask, key_index, scale)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = pack_key_mask(key_mask)
    call = _DIRECT if registration.called_directly(q, k, v) else _OP
    return call(q, k, v, key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, scale, len_q, len_k)[0]


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, fp32 projections beside bf16 activations are one dtype; float64 is left alone, as torch's own ops
    do.
    """
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)
