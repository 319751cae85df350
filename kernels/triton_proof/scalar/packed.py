"""Arithmetic on 16-bit floats, alone or two in a register, and on pairs of 16-bit integers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from triton_proof.ptx.syntax import UnsupportedPTX
from triton_proof.scalar.form import Form
from triton_proof.scalar.formats import bf16_to_f32, f64_to_bf16, to_f16
from triton_proof.scalar.operands import Getter

_OPERATIONS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {  # number of operands, function
    "add": (2, np.add), "sub": (2, np.subtract), "mul": (2, np.multiply), "fma": (3, lambda a, b, c: a * b + c),
    "neg": (1, np.negative), "abs": (1, np.abs), "min": (2, np.fmin), "max": (2, np.fmax),
}  # fmt: skip


def floats(form: Form) -> Getter:
    """Operation on 16-bit floats, computed in float64 and rounded once."""
    if form.name not in _OPERATIONS:
        raise UnsupportedPTX(form.ins.opcode)
    count, operation = _OPERATIONS[form.name]
    if "NaN" in form.parts:
        operation = {"min": np.minimum, "max": np.maximum}[form.name]
    pair, brain = form.kind.endswith("x2"), form.kind.startswith("bf16")
    readers = form.read(count, "b32" if pair else "b16")

    def widen(x: np.ndarray) -> np.ndarray:
        return (bf16_to_f32(x) if brain else x.view(np.float16)).astype(np.float64)

    def apply(values: list[np.ndarray]) -> np.ndarray:
        out = operation(*map(widen, values))
        return f64_to_bf16(out) if brain else to_f16(out)

    if not pair:
        return lambda m: apply([read(m) for read in readers])

    def on_pairs(m: Any) -> np.ndarray:
        values = [read(m) for read in readers]
        return _join(apply([_half(x, 0) for x in values]), apply([_half(x, 16) for x in values]))

    return on_pairs


def integers(form: Form) -> Getter:
    """Operation on pairs of 16-bit integers, each of which wraps around for itself."""
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if form.name not in functions or len(form.ops) != 3:
        raise UnsupportedPTX(form.ins.opcode)
    operation, dtype = functions[form.name], np.uint16 if form.kind[0] == "u" else np.int16
    x, y = form.read(2, "b32")

    def on_pairs(m: Any) -> np.ndarray:
        a, b = x(m), y(m)
        halves = [operation(_half(a, n).view(dtype), _half(b, n).view(dtype)).view(np.uint16) for n in (0, 16)]
        return _join(*halves)

    return on_pairs


def _half(x: np.ndarray, bit: int) -> np.ndarray:
    return (x >> np.uint32(bit)).astype(np.uint16)


def _join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
