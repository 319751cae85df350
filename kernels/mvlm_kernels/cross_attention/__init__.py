"""Cross-attention with one short side, forward and backward; see :func:`cross_attention`.

:func:`route` says what runs. Where the backward is:

- Kernels: ``launch.backward`` runs ``short_kv_backward`` (``short_kv.py``) for short keys and ``short_q_backward``
  (``short_q.py``) for short queries. With ``key_index``, with grouped heads, or without tiles for a single pass,
  ``short_q_backward_dq`` and ``long_kv_backward`` (``long_kv.py``) run for short queries instead.
- Composed of torch ops, on a CPU or where no kernel runs (``composed.py``): by two matrix products, whose backward is
  ``_Products.backward`` there, or SDPA and its backward in torch.
- The op without a kernel, such as with ``return_lse`` on a CPU: ``reference_backward`` (``reference.py``).
"""

import math
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import check_choice, check_flag
from mvlm_kernels.cross_attention import composed
from mvlm_kernels.cross_attention.arguments import (
    HEAD_WIDTHS,
    LONGEST_SHORT_SIDE,
    Options,
    Sides,
    as_autocast,
    check_arguments,
    check_ranges,
    check_values,
    dropout_of,
    invert_key_index,
    key_sequences,
    longest_sequences,
    refuse_others,
    scale_of,
)
from mvlm_kernels.cross_attention.composed import attend_heads
from mvlm_kernels.cross_attention.ops import attention, kernels_of, reasons, why_not_triton
from mvlm_kernels.cross_attention.reference import draw_seed, pack_key_mask, reference_forward
from mvlm_kernels.dispatch import Refusal, refusal

__all__ = [
    "HEAD_WIDTHS",
    "LONGEST_SHORT_SIDE",
    "attend_heads",
    "cross_attention",
    "pack_key_mask",
    "why_not_triton",
]


class _Options(TypedDict, total=False):
    """Types of the keyword arguments of :func:`cross_attention`."""

    key_lengths: Tensor | None
    key_mask: Tensor | None
    key_index: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    scale: float | None
    max_len_q: int | None
    max_len_k: int | None
    dropout_p: float
    seed: int | Tensor | None
    backend: Literal["auto", "sdpa", "math"]


def _explain(**call: Any) -> tuple[Refusal, ...]:
    refuse_others(call["others"])
    q, k, v = as_autocast(call["q"], call["k"], call["v"])
    sides = Sides._make(call.get(name) for name in Sides._fields)
    given = call["max_len_q"], call["max_len_k"]
    options = _checked(q, k, v, sides, given, call["scale"], call["dropout_p"], call["seed"], call["backend"])
    check_flag("return_lse", call["return_lse"])
    found = reasons(q, k, options)
    if call["backend"] == "auto":
        return found
    return (refusal(f'backend="{call["backend"]}" was given', 'it runs; pass "auto"'), *found)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, sides: Sides, given: composed.Given, scale: float | None, dropout_p: float,
    seed: int | Tensor | None, backend: str,
) -> Options:  # fmt: skip
    """Check the arguments, and return the scale, the longest sequences and the dropout of the call.

    given: its max_len_q and max_len_k. No seed is drawn if none is given.
    """
    check_arguments(q, k, v, sides, *given)
    check_choice("backend", backend, ("auto", "sdpa", "math"))
    rate, given_seed = 0.0, None  # a constant for a compiler, to which dropout_p is symbolic
    if type(dropout_p) not in (int, float) or dropout_p or seed is not None:
        rate, given_seed = dropout_of(dropout_p, seed, q.device)
    return Options(scale_of(scale, q.shape[-1]), *longest_sequences(q, k, sides, *given), rate, given_seed)


def route(
    q: Tensor, k: Tensor, sides: Sides, options: Options, given: composed.Given, backend: str = "auto",
    return_lse: bool = False,
) -> Literal["op", "formula", "sdpa", "math"]:  # fmt: skip
    """Name of the way in which a checked call runs. given: its max_len_q and max_len_k.

    "op": the registered op, by a kernel or, where none runs, the reference. "sdpa" and "math": ``composed.py``.
    "formula": the reference, differentiated by autograd any number of times, in transforms of ``torch.func``.
    """
    named = None if backend == "auto" else cast(composed.Way, backend)
    if (named is None and kernels_of(q, k, options)) or return_lse or registration.batched(*sides):
        return "op"
    on_cpu, bounds = q.device.type == "cpu", (sides.cu_seqlens_q, sides.cu_seqlens_k)
    dense = all(x is None for x in bounds)
    if registration.transformed():
        if on_cpu:
            return "op" if torch.compiler.is_compiling() else "formula"
        return "sdpa" if dense else "op"
    if torch.compiler.is_exporting() and on_cpu and not named:
        return "op"  # padding and products would fix lengths of 0 and 1 in the program
    subclass = type(q) not in (Tensor, torch.nn.Parameter)  # such as a tensor without values
    if torch.compiler.is_compiling() or q.is_meta or subclass:  # then lengths cannot be read
        bounded = all(x is None or most is not None for x, most in zip(bounds, given, strict=True))
        if not bounded or (subclass and named is None and (on_cpu or not dense)):
            return "op"
    if named:
        return named
    if options.dropout_p and (on_cpu or options.seed is not None):
        return "math"  # SDPA draws its own dropout
    return composed.rule(q.device, q.dtype, options.max_len_k, torch.is_grad_enabled())


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
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
    dropout_p: float = 0,  # an int: a compiler with dynamic shapes would compile twice for a float
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: Literal["auto", "sdpa", "math"] = "auto",
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which one side is short (text, at most 128 tokens) and the other is image patches.

    ``out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[r, j, g]) v[r, j, g]`` with ``r = key_index[b]``, or b
    without an index, and ``g = h // (H // Hk)``.

    Dimensions: B query sequences, B' key sequences, Lq and Lk rows of each, Tq and Tk packed rows, H heads of q, Hk
    heads of k and v (H or a divisor of it: grouped-query and multi-query attention), D head width (the kernels take
    multiples of 8 up to 128). The layout is (batch, length, heads, width), not SDPA's (batch, heads, length, width).

    Args:
        q: (B, Lq, H, D), or packed (Tq, H, D) with cu_seqlens_q. Floating.
        k, v: (B', Lk, Hk, D), or packed (Tk, Hk, D) with cu_seqlens_k. Same dtype as q. Either side alone may be
            packed. Heads that several query heads share are read in place.
        key_lengths: (B',) int32 or int64. Keys past the length do not exist: they may hold NaN, and their gradients
            are zeros.
        key_mask: (B', Lk) bool, True = the key exists, or the int64 words that :func:`pack_key_mask` makes of such a
            mask. If key_lengths is also given, a key exists only if both allow it. A query without any key gives
            zeros and has zero gradients.
        key_index: (B,) int32 or int64. Query sequence b reads key sequence key_index[b] in place. Gradients of a
            sequence with several readers add up in a fixed order. Without an index B' = B. Calls that share an index
            should share the tensor: what is made of it is kept.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) and (B' + 1,) int32 or int64. Sequence b is rows cu_seqlens[b] to
            cu_seqlens[b + 1] of a packed side. Output rows that belong to no sequence are zeros.
        scale: a float, factor of the scores; D ** -0.5 by default. Multiply q by a learned temperature instead.
        max_len_q, max_len_k: upper bound of the sequence lengths of a packed side, by which tiles are chosen. A packed
            side without a bound is assumed to be at most 128 long, unless the other side is known to be short. A
            longer sequence is a ValueError on the CPU. On a GPU its output is NaN, because reading the lengths would
            wait for the device.
        dropout_p: probability in [0, 1) with which a probability counts as 0 in the output; the others count
            ``1 / (1 - dropout_p)`` times. Pass 0 outside of training.
        seed: of the dropout, an int or an int64 tensor of one element; drawn from torch's generator of the device if
            None. What is dropped is a function of the seed and of query sequence, head, query and key
            (``reference.kept``): the same in every layout, on every backend, and in the backward. Where SDPA runs on a
            GPU, it draws its own; a given seed takes two matrix products there.
        return_lse: also return the natural log-sum-exp of the scaled scores, (B, H, Lq) or packed (H, Tq), float64 for
            float64 and else float32. It has no gradient, and is -inf for a query without keys. Where no kernel runs,
            the reference computes it.
        backend: "auto", or what runs in place of a kernel, under ``use_backend`` too: "sdpa", or "math" for two matrix
            products.

    Returns:
        The output in q's shape and dtype, contiguous; with return_lse, output and log-sum-exp. bfloat16, float16 and
        float32 (TF32 on a GPU) accumulate in float32; float64 has no compiled kernel. Autocast casts q, k and v first.
        Where no kernel runs, such as on a CPU or if both sides are longer than 128, SDPA or two matrix products do, on
        padded rows; :func:`mvlm_kernels.explain` names the backend and the reasons.

    Raises:
        TypeError: for an argument of torch's attention, with what to pass instead.
        ValueError: for arguments of another kind, shapes, dtypes or devices that do not fit, and a tensor as scale.
            Values of lengths and indices are checked for CPU tensors, and for GPU tensors with MVLM_KERNELS_DEBUG=1.
    """
    if others:
        refuse_others(others)
    return_lse = check_flag("return_lse", return_lse)
    q, k, v = as_autocast(q, k, v)
    sides, given = Sides(key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k), (max_len_q, max_len_k)
    options = _checked(q, k, v, sides, given, scale, dropout_p, seed, backend)
    way = route(q, k, sides, options, given, backend, return_lse)
    if options.dropout_p and options.seed is None and way != "sdpa":
        options = options._replace(seed=draw_seed(q.device))
    if way == "sdpa" or way == "math":
        if dispatch.checks_values(q.device) and registration.has_values(q, k):
            check_ranges(k, sides)
        return composed.attend(q, k, v, sides, options, given, way)
    if way == "formula":
        check_values(q, k, sides, options.max_len_q, options.max_len_k)
        return reference_forward(q, k, v, sides, options)[0]
    if key_mask is not None and key_mask.dtype == torch.bool and not torch.compiler.is_compiling():
        sides = sides._replace(key_mask=pack_key_mask(key_mask))  # a compiler would make a graph for each width
    if key_index is not None and (sequences := key_sequences(k, sides)):
        sides = Sides._make((*sides[:5], *invert_key_index(key_index, sequences)))
    out, lse = attention.on(q, k, v)(q, k, v, *sides, *options)
    return (out, lse * math.log(2)) if return_lse else out
