"""Conversions between types: ``cvt`` in all forms that are understood."""

from typing import Any

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS, Instruction, UnsupportedPTX
from triton_proof.scalar.formats import FLOATS, NAN_16, bf16_to_f32, dtype_of, f32_to_bf16, f64_to_bf16, flush, to_f16
from triton_proof.scalar.operands import Getter, Reader

_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODES = {"rn", "rz", "rna", *_TO_WHOLE}


def build(ins: Instruction, get: Reader) -> Getter:
    """Function of the machine that computes the value of a ``cvt``. Raises UnsupportedPTX for an unknown form."""
    kinds = [p for p in ins.parts[1:] if p in TYPE_BITS]
    modes = [p for p in ins.parts[1:] if p in _MODES]
    if set(ins.parts[1:]) - set(kinds) - set(modes) - {"ftz", "sat", "relu", "satfinite"} or len(kinds) < 2:
        raise UnsupportedPTX(ins.opcode)
    to, of, mode = kinds[0], kinds[-1], modes[0] if modes else ""
    if to in ("bf16x2", "f16x2"):
        return _pack(ins, get, to, of, mode)
    if to == "tf32":
        return _tf32(ins, get, mode)
    if set(ins.parts) & {"relu", "satfinite"}:
        raise UnsupportedPTX(ins.opcode)
    a = get(ins.operands[1], of)
    if of in FLOATS and to in FLOATS:
        return _between_floats(ins, a, of, to, mode)
    if of in FLOATS:
        if mode not in _TO_WHOLE:
            raise UnsupportedPTX(ins.opcode)
        widen = bf16_to_f32 if of == "bf16" else (lambda x: x)
        if "ftz" in ins.parts:
            return lambda m: _to_integer(flush(widen(a(m))), to, mode)
        return lambda m: _to_integer(widen(a(m)), to, mode)
    if to in FLOATS:
        if mode not in ("rn", ""):
            raise UnsupportedPTX(ins.opcode)
        if to == "bf16":
            return lambda m: f64_to_bf16(a(m).astype(np.float64))
        return lambda m: a(m).astype(dtype_of(to))
    if "sat" in ins.parts:
        return lambda m: _clamp(a(m), dtype_of(to))
    return lambda m: a(m).astype(dtype_of(to))


def _pack(ins: Instruction, get: Reader, to: str, of: str, mode: str) -> Getter:
    """Two float32 rounded into the halves of a register; the first operand is the upper half."""
    if mode != "rn" or of != "f32" or len(ins.operands) != 3 or "satfinite" in ins.parts:
        raise UnsupportedPTX(ins.opcode)
    narrow = f32_to_bf16 if to == "bf16x2" else to_f16
    relu = "relu" in ins.parts
    upper, lower = get(ins.operands[1], "f32"), get(ins.operands[2], "f32")

    def pack(m: Any) -> np.ndarray:
        a, b = upper(m), lower(m)
        if relu:
            a, b = np.maximum(a, 0), np.maximum(b, 0)
        return (narrow(a).astype(np.uint32) << np.uint32(16)) | narrow(b)

    return pack


def _tf32(ins: Instruction, get: Reader, mode: str) -> Getter:
    """float32 rounded to 10 bits of mantissa, ties away from zero."""
    if mode != "rna" or "relu" in ins.parts:
        raise UnsupportedPTX(ins.opcode)
    bits = get(ins.operands[1], "b32")

    def tf32(m: Any) -> np.ndarray:
        x = bits(m)
        size = x & np.uint32(0x7FFFFFFF)
        rounded = (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        special = np.where(size > np.uint32(0x7F800000), np.uint32(0x7FFFFFFF), x)
        return np.where(size >= np.uint32(0x7F800000), special, rounded)

    return tf32


def _between_floats(ins: Instruction, a: Getter, of: str, to: str, mode: str) -> Getter:
    ftz, sat = "ftz" in ins.parts, "sat" in ins.parts
    whole = _TO_WHOLE.get(mode)

    def wide(m: Any) -> np.ndarray:
        x = a(m)
        x = bf16_to_f32(x) if of == "bf16" else x
        return flush(x) if ftz and of == "f32" else x

    if mode == "rz" and of == "f32" and to == "bf16":

        def cut(m: Any) -> np.ndarray:
            x = wide(m)
            return np.where(np.isnan(x), NAN_16, (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16))

        return cut
    if mode not in ("", "rn") and whole is None:
        raise UnsupportedPTX(ins.opcode)

    def convert(m: Any) -> np.ndarray:
        x = wide(m)
        if whole is not None:
            x = whole(x)
        if sat:
            x = np.clip(np.where(np.isnan(x), 0, x), 0, 1).astype(x.dtype)
        if to == "bf16":
            return f64_to_bf16(x) if x.dtype == np.float64 else f32_to_bf16(x.astype(np.float32))
        if to == "f16":
            return x.view(np.uint16) if x.dtype == np.float16 else to_f16(x)
        y = x.astype(dtype_of(to))
        return flush(y) if ftz and to == "f32" else y

    return convert


def _to_integer(x: np.ndarray, kind: str, mode: str) -> np.ndarray:
    """x rounded to a whole number, clamped to the range of ``kind``. NaN gives 0, or the top bit in 64 bits."""
    y = _TO_WHOLE[mode](x.astype(np.float64))
    bits, signed, dtype = TYPE_BITS[kind], kind[0] == "s", dtype_of(kind)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    nan = np.isnan(y)
    inside = np.clip(np.where(nan, 0.0, y), float(low), float(high))
    if bits < 64:
        return inside.astype(np.int64).astype(dtype)
    top = inside >= float(high)  # float64 rounds the largest integer up, out of range
    out = np.where(top, np.array(high).astype(dtype), np.where(top, 0.0, inside).astype(dtype))
    return np.where(nan, np.array([1 << 63], np.uint64).view(dtype), out)


def _clamp(x: np.ndarray, dtype: Any) -> np.ndarray:
    to, of = np.iinfo(dtype), np.iinfo(x.dtype)
    return np.clip(x, max(to.min, of.min), min(to.max, of.max)).astype(dtype)
