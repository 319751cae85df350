# pyright: reportArgumentType=false
"""Triton helpers that several ops share, with the same meaning in compiled and in interpreted kernels.

Triton's interpreter is wrong for bfloat16: ``tl.dot`` multiplies bit patterns, sums are wrong, and conversions truncate
where a GPU rounds to nearest even (triton issue 11584). So every kernel of this package multiplies with :func:`dot`,
computes on values that :func:`widen` has converted to the accumulator's dtype, and stores values that :func:`cast` has
rounded. Compiled, the three are exactly ``tl.dot``, ``.to`` and ``.to``.

Importing this module imports Triton. Only kernel modules import it, when a kernel first runs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype

# Triton decides between interpreter and compiler when a kernel is decorated. This constant is read at the same time.
INTERPRETING: bool = bool(knobs.runtime.interpret)
_INTERPRET = tl.constexpr(INTERPRETING)


@triton.jit
def _round_to_tf32(x):
    """Round float32 to TF32's 10 bits of fraction.

    A matrix instruction ignores the other 13 bits. Without this it would multiply operands cut towards zero, an error
    three times as large, and one that shrinks every product.
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in the dtype of ``acc``.

    a (M, K) and b (K, N) of one dtype, acc (M, N) float32 (float64 interpreted). PRECISION is ``"tf32"``, ``"tf32x3"``
    or ``"ieee"`` and matters for float32 operands only. The interpreter always computes IEEE products.
    """
    if _INTERPRET:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a = _round_to_tf32(a)
        b = _round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the accumulator's dtype ACC (float32, or float64 interpreted). Arithmetic on bfloat16 needs this first."""
    return x.to(ACC)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x (float32, or float64 interpreted) as DTYPE, rounded to nearest even, NaN kept."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN with its payload in the low bits would round to infinity, so NaNs keep their high half and become quiet.
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        y = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@functools.cache
def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """The dtype to compute in: float64 if an input is (gradcheck, interpreted), else float32."""
    return tl.float64 if compute_dtype(*dtypes) == torch.float64 else tl.float32


@triton.jit
def column_sum_kernel(
    x_ptr, out_ptr, N, C, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out (C,) = column sums of x (N, C), in a fixed order. Program (width slice)."""
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        total += tl.load(x_ptr + (n * C)[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out_ptr + c, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=c < C)


def sum_columns(x: Tensor, out: Tensor, rows: int, width: int) -> None:
    """Sum the rows of x (rows, width) into out (width,), in a fixed order. x has the dtype of the sums."""
    dispatch.launch(
        column_sum_kernel, (dispatch.ceil_div(width, 32),), x, out, rows, width,
        ACC=accumulator(x.dtype), BLOCK_N=64, BLOCK_C=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
