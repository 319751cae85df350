"""Integer and bit operations of PTX that NumPy does not have, on arrays of one dtype."""

import numpy as np


def shift(a: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """a shifted by count (uint32); a shift by the width or more gives 0, or the sign."""
    bits = a.dtype.itemsize * 8
    n = np.minimum(count, np.uint32(bits - 1)).astype(a.dtype)
    out = np.left_shift(a, n) if left else np.right_shift(a, n)
    over = count >= bits
    # An arithmetic shift by one bit less than the width has left the sign alone already.
    return np.where(over, np.zeros((), a.dtype), out) if over.any() and (left or a.dtype.kind == "u") else out


def funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    """Word of (high, low), both uint32, shifted by count as 64 bits. ``wrap``: count modulo 32, else at most 32."""
    n = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)


def trunc_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient rounded toward zero; all bits set where b is 0."""
    zero = b == 0
    if zero.any():
        b = np.where(zero, np.ones((), b.dtype), b)
    out = a // b
    if a.dtype.kind != "u":
        out = out + ((out * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), out) if zero.any() else out


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - trunc_div(a, b) * b


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits <= 32:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    mask, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = ua & mask, ua >> s, ub & mask, ub >> s
    low, middle, other = a_low * b_low, a_high * b_low, a_low * b_high
    carry = ((low >> s) + (middle & mask) + (other & mask)) >> s
    out = a_high * b_high + (middle >> s) + (other >> s) + carry
    if a.dtype.kind == "i":
        out = out - np.where(a < 0, ub, 0).astype(np.uint64) - np.where(b < 0, ua, 0).astype(np.uint64)
        return out.view(np.int64)
    return out


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any logic function of three bits, by its truth table."""
    out = np.zeros((), np.uint32)
    for i in range(8):
        if table >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of (b, a), each named by 3 bits of the selector. A fourth bit repeats the byte's sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where((byte & np.uint64(128)) != 0, np.uint64(255), np.uint64(0))
        byte = np.where((pick & np.uint32(8)) != 0, sign, byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def bfe(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``length`` bits of a from ``position``, extended by zeros or, for signed a, by the field's sign."""
    bits = a.dtype.itemsize * 8
    p = (position & np.uint32(255)).astype(np.int64)
    n = (length & np.uint32(255)).astype(np.int64)
    signed = a.dtype.kind == "i"
    wide = a.astype(np.int64) if signed else a.astype(np.uint64).view(np.int64)
    moved = np.where(p < bits, wide >> np.minimum(p, 63), np.where(wide < 0, -1, 0) if signed else 0)
    mask = np.where(n >= 64, -1, (np.int64(1) << np.minimum(n, 63)) - 1)
    out = moved & mask
    if signed:
        top = np.minimum(p + n - 1, bits - 1)
        negative = (n > 0) & (((wide >> np.clip(top, 0, 63)) & 1) != 0)
        out = np.where(negative, out | ~mask, out)
    return out.astype(a.dtype)


def bfi(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """b with ``length`` bits from ``position`` replaced by the low bits of a."""
    bits = a.dtype.itemsize * 8
    p = np.minimum(position & np.uint32(255), bits).astype(np.uint64)
    n = np.minimum(length & np.uint32(255), bits).astype(np.uint64)
    ones = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))
    safe = np.minimum(p, np.uint64(63))
    mask = np.where(p < bits, ones << safe, np.uint64(0))
    return (((a.astype(np.uint64) << safe) & mask) | (b.astype(np.uint64) & ~mask)).astype(a.dtype)


def bit_length(a: np.ndarray) -> np.ndarray:
    """Position of the highest set bit plus one, uint32."""
    out, x = np.zeros(a.shape, np.uint32), a.astype(np.uint64)
    for n in (32, 16, 8, 4, 2, 1):
        big = x >= (np.uint64(1) << np.uint64(n))
        out += np.where(big, np.uint32(n), np.uint32(0))
        x = np.where(big, x >> np.uint64(n), x)
    return out + (x > 0).astype(np.uint32)


def brev(a: np.ndarray) -> np.ndarray:
    """The bits of a in reverse."""
    bits, out, one = a.dtype.itemsize * 8, np.zeros_like(a), a.dtype.type(1)
    for i in range(bits):
        out |= ((a >> a.dtype.type(i)) & one) << a.dtype.type(bits - 1 - i)
    return out
