"""Triton helpers that mean the same compiled and interpreted.

Triton's interpreter multiplies the bit patterns of bfloat16 in ``tl.dot``, adds them wrongly, and truncates where a GPU
rounds to nearest even (triton issue 11584). Every kernel of this package therefore multiplies with :func:`dot`,
computes on values that :func:`widen` has turned into the accumulator's type, and stores what :func:`cast` has rounded.
Compiled, the three are exactly ``tl.dot``, ``.to`` and ``.to``.

Importing this module imports Triton; only the ``triton.py`` of each op does so, and only when its kernels first run.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton decides when a kernel is decorated whether the process interprets or compiles; so do we, once.
INTERPRETING: bool = bool(knobs.runtime.interpret)
_INTERPRET = tl.constexpr(INTERPRETING)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in the type of ``acc``.

    a (M, K) and b (K, N) of one type, acc (M, N) float32 (float64 interpreted). PRECISION is ``"tf32"`` or ``"ieee"``
    and matters for float32 operands alone; the interpreter always computes IEEE products.
    """
    if _INTERPRET:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the accumulator's type ACC (float32, or float64 interpreted). Never compute on bfloat16 before this."""
    return x.to(ACC)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x (float32, or float64 interpreted) as DTYPE, rounded to nearest even, NaN kept."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN whose payload sits in the low bits would round to infinity: keep its high half and make it quiet.
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        y = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y
