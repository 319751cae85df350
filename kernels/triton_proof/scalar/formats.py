"""Bit patterns and numbers: the NumPy dtype of each PTX type, and roundings that NumPy does not have."""

from typing import Any

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}
FLOATS = ("f16", "bf16", "f32", "f64")
PATTERNS = ("pred", "tf32", "bf16", "f16x2", "bf16x2", "u16x2", "s16x2")  # held as bits, without a NumPy number type
NAN_16 = np.uint16(0x7FFF)  # a NaN that is rounded to 16 bits, in either type


def dtype_of(kind: str) -> Any:
    """NumPy dtype in which a PTX type is computed; unsigned bits for the types in PATTERNS."""
    bits = TYPE_BITS[kind]
    if kind in PATTERNS or kind[0] in "bu":
        return UNSIGNED[bits]
    return (FLOAT if kind[0] == "f" else SIGNED)[bits]


def pattern(x: np.ndarray, bits: int) -> np.ndarray:
    """A value as the unsigned pattern of a register of ``bits``, extended by its own sign."""
    have = x.dtype.itemsize * 8
    if bits == 1 or x.dtype == np.bool_:
        return x if bits == 1 else x.astype(UNSIGNED[bits])
    if have == bits:
        return x if x.dtype == UNSIGNED[bits] else x.view(UNSIGNED[bits])
    if x.dtype.kind == "i":
        return x.astype(SIGNED[bits]).view(UNSIGNED[bits])
    return x.view(UNSIGNED[have]).astype(UNSIGNED[bits])


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) as float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Patterns of float32 rounded to the nearest bfloat16, ties to even; every NaN becomes 0x7fff, as on a GPU."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    out = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, NAN_16, out) if nan.any() else out


def to_f16(x: np.ndarray) -> np.ndarray:
    """Patterns of float32 or float64 rounded to the nearest float16, ties to even; every NaN becomes 0x7fff."""
    out = x.astype(np.float16).view(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, NAN_16, out) if nan.any() else out


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    """Patterns of float64 rounded once to the nearest bfloat16."""
    return f32_to_bf16(round_odd_f32(x))


def round_odd_f32(x: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd: a later rounding to fewer bits then rounds as if it saw x itself."""
    y = x.astype(np.float32)
    back = y.astype(np.float64)
    bits = y.view(np.uint32)
    # Toward zero first. Then the last bit is set where anything was cut off.
    bits = np.where(np.abs(back) > np.abs(x), bits - np.uint32(1), bits)
    inexact = (back != x) & np.isfinite(x)
    return np.where(inexact, bits | np.uint32(1), bits).astype(np.uint32).view(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero of the same sign (``.ftz``)."""
    small = np.abs(x) < np.float32(1.17549435e-38)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once."""
    product, wide_c = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact in float64
    total = product + wide_c
    # Rounding twice matters only where the float64 sum lies on a tie of float32. The rounding error says to which side.
    tie = (total.view(np.int64) & np.int64(0x1FFFFFFF)) == np.int64(0x10000000)
    if tie.any():
        rest = total - product
        error = (product - (total - rest)) + (wide_c - rest)
        bits = total.view(np.int64)
        away = (error > 0) == (total > 0)
        total = np.where(tie & (error != 0), bits + np.where(away, 1, -1), bits).view(np.float64)
    return total.astype(np.float32)
