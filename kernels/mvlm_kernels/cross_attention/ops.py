"""The op ``torch.ops.mvlm_kernels.cross_attention``: backends, fake tensors, gradient, and reasons against Triton."""

import functools
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import FLOATS
from mvlm_kernels.cross_attention.arguments import (
    FLAT,
    HEAD_WIDTHS,
    LONGEST_SHORT_SIDE,
    Options,
    bucket,
    check_values,
    short_side,
    unflattened,
)
from mvlm_kernels.cross_attention.reference import reference_backward, reference_forward
from mvlm_kernels.dispatch import FLOAT64, NO_TF32, Refusal, refusal

_NAME = "cross_attention"


def _implementation(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    sides, options = unflattened(flat)
    if dispatch.checks_values(q.device):
        check_values(q, k, sides, options.max_len_q, options.max_len_k)
    if kind := kernels_of(q, k, options):
        from mvlm_kernels.cross_attention import launch

        kind = _NAME, q.device, q.dtype, *kind
        return dispatch.run_kernels(kind, launch.forward, reference_forward, q, k, v, sides, options)
    if q.is_meta:  # lengths of packed rows have no values to read
        return _fake(q)
    return reference_forward(q, k, v, sides, options)


def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    packed = q.dim() == 3
    lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(
        lse_shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )


def _backward_implementation(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (sides, options), (need_dq, need_dkv) = unflattened(flat[:FLAT]), flat[FLAT:]
    if kind := kernels_of(q, k, options):
        from mvlm_kernels.cross_attention import launch

        grads = dispatch.run_kernels(
            (_NAME, q.device, q.dtype, *kind), launch.backward,
            lambda *_: reference_backward(grad, q, k, v, lse, sides, options),
            grad, q, k, v, out, lse, sides, options, need_dq, need_dkv,
        )  # fmt: skip
    elif q.is_meta:
        return _backward_fake(grad, q, k, v, need_dq, need_dkv)
    else:
        grads = reference_backward(grad, q, k, v, lse, sides, options)
    # An op returns tensors, so a gradient that is not needed is an empty one.
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
        *sides, scale, max_len_q, max_len_k, dropout_p, seed = args
        ctx.numbers = scale, max_len_q, max_len_k, dropout_p
        # Only the short-Q backward reads the output, for delta. With short keys it is not kept in memory.
        kept = out if short_side(max_len_q, max_len_k) == "q" else None
        ctx.save_for_backward(q, k, v, kept, lse, *sides, seed)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grads[0] is None:
            return (None,) * (4 + FLAT)
        need_dq, need_dk, need_dv = ctx.needs_input_grad[1:4]
        need_dkv = need_dk or need_dv
        *saved, seed = ctx.saved_tensors
        backward = _backward_op.in_function(grads[0], *saved[:3])
        dq, dk, dv = backward(grads[0], *saved, *ctx.numbers, seed, need_dq, need_dkv)
        return None, dq if need_dq else None, dk if need_dk else None, dv if need_dv else None, *(None,) * FLAT


_FLAT = (  # the fields of Sides and Options
    "Tensor? key_lengths, Tensor? key_mask, Tensor? key_index, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? reader_order, Tensor? reader_spans, float scale, SymInt max_len_q, SymInt max_len_k, "
    "float dropout_p, Tensor? seed"
)
attention = registration.define(
    f"cross_attention(Tensor q, Tensor k, Tensor v, {_FLAT}) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _CrossAttention,
)
_backward_op = registration.define(
    f"cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, {_FLAT}, "
    "bool need_dq, bool need_dkv) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
    registration.no_second_derivative(
        "cross_attention", "mvlm_kernels.cross_attention.reference.cross_attention_reference"
    ),
)


def why_not_triton(
    device: torch.device, dtype: torch.dtype, *, head_width: int, short_rows: int
) -> tuple[Refusal, ...]:
    """Reasons why calls of this kind do not run on the fused kernels; empty if they do.

    Like :func:`mvlm_kernels.explain`, but without tensors: for choosing an implementation in advance. Runs no kernel.
    The result is a constant of a compiled graph.

    device: of q, k and v. On a machine without CUDA, only width, length and dtype are checked for a CUDA device. dtype:
    of q, k and v, after autocast. head_width: D. short_rows: the longest sequence of the shorter side.
    """
    if head_width not in HEAD_WIDTHS:
        return (_width_refusal(head_width),)
    if dtype not in FLOATS:
        return (refusal(f"{dtype} has no kernel", "pass float16, bfloat16 or float32"),)
    if short_rows > LONGEST_SHORT_SIDE:
        reason = f"the shorter side has {short_rows} rows, the kernels take {LONGEST_SHORT_SIDE}"
        return (refusal(reason, "use scaled_dot_product_attention"),)
    if device.type != "cuda":
        return dispatch.device_reasons(device)
    if not torch.cuda.is_available():
        return (FLOAT64,) if dtype == torch.float64 else ()
    return _kind_reasons(device, dtype, head_width, bucket(short_rows), 0)


def reasons(q: Tensor, k: Tensor, options: Options) -> tuple[Refusal, ...]:
    """Every reason against the fused kernels for this call that the host knows."""
    kind = _kind(q, k, options)
    if kind is None:
        return (*dispatch.device_reasons(q.device), *_shape_refusals(q, options))
    return _kind_reasons(q.device, q.dtype, *kind)


def kernels_of(q: Tensor, k: Tensor, options: Options) -> tuple[int, int, int] | None:
    """Kind of the fused kernels that run this call, see :func:`_kind`; None if torch does.

    A compiler takes the result as a constant of its graph. Raises RuntimeError with the reasons if
    ``use_backend("triton")`` is in force and they cannot.
    """
    kind = _kind(q, k, options)
    if kind is None:
        if dispatch.forced() == "triton":
            dispatch.refuse_if_forced(_shape_refusals(q, options)[0])
        return None
    return kind if _takes_triton(q.device, q.dtype, *kind) else None


def _kind(q: Tensor, k: Tensor, options: Options) -> tuple[int, int, int] | None:
    """Head width, tile length of the short side and number of features that take registers (dropout, grouped heads).

    Plain ints, even for a compiler's symbolic sizes. None for a width or lengths that no kernel has.
    """
    side, width = short_side(options.max_len_q, options.max_len_k), q.shape[-1]
    if side is None or width not in HEAD_WIDTHS:
        return None
    if torch.compiler.is_compiling():
        width = next(w for w in HEAD_WIDTHS if w == width)
    # Off a GPU the length does not matter, and comparing it would make a compiler's graph one of this length alone.
    rows = bucket(options.max_len_k if side == "kv" else options.max_len_q) if q.is_cuda else 16
    return width, rows, (1 if options.dropout_p else 0) + (1 if q.shape[-2] != k.shape[-2] else 0)


def _shape_refusals(q: Tensor, options: Options) -> list[Refusal]:
    found = [] if q.shape[-1] in HEAD_WIDTHS else [_width_refusal(q.shape[-1])]
    if short_side(options.max_len_q, options.max_len_k) is None:
        reason = f"both sides are longer than {LONGEST_SHORT_SIDE} ({options.max_len_q} queries, "
        found.append(refusal(f"{reason}{options.max_len_k} keys)", "torch runs; shorten one side"))
    return found


def _width_refusal(width: int) -> Refusal:
    return refusal(
        f"heads are {width} wide, the kernels take multiples of 8 up to 128",
        "torch runs; choose another number of heads",
    )


@dispatch.constant_when_compiled
def _takes_triton(device: torch.device, dtype: torch.dtype, width: int, rows: int, extras: int) -> bool:
    return dispatch.choose(_kind_reasons(device, dtype, width, rows, extras)) == "triton"


@dispatch.constant_when_compiled
def _kind_reasons(device: torch.device, dtype: torch.dtype, width: int, rows: int, extras: int) -> tuple[Refusal, ...]:
    # A compiler cannot trace calls of the driver and reads of tile tables, so the result is a constant of its graph.
    found = dispatch.device_reasons(device) + dispatch.without_resources(_NAME, device, dtype, width, rows, extras)
    return found or type_reasons(dtype, width, rows, dispatch.arch(device), tf32(dtype), extras)


def tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and dispatch.tf32_allowed()


@functools.cache
def type_reasons(
    dtype: torch.dtype, width: int, rows: int, arch: int, tf32: bool, extras: int = 0
) -> tuple[Refusal, ...]:
    """Reasons against the kernels that depend on dtype and tile sizes. rows: tile length of the short side.

    They apply to GPUs only; the interpreter accepts every dtype.
    """
    if dtype == torch.float64:
        return (FLOAT64,)
    if dtype == torch.float32 and not tf32:
        return (NO_TF32,)
    from mvlm_kernels.cross_attention.tiles import has_tiles

    if not has_tiles(dtype, width, rows, arch, extras):
        having = " with a dropout or grouped heads" if extras else ""
        reason = f"no tile of {dtype} at width {width} and {rows} rows{having} fits this GPU"
        return (refusal(reason, "torch runs; 16 bits, narrower heads or a shorter side take less"),)
    return ()
