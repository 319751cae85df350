"""Readers of operands: functions of the machine that give an operand's value as a PTX type.

Values are arrays of shape (blocks or 1, threads or 1). A value that is the same for all threads of a block, or for all
blocks, is held and computed once. Registers hold unsigned bit patterns, and each reader views them as its type.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS, Imm, Not, Operand, Reg, Sym, UnsupportedPTX
from triton_proof.scalar.formats import FLOAT, SIGNED, UNSIGNED, dtype_of

Getter = Callable[[Any], np.ndarray]  # a function of the machine
Reader = Callable[[Operand, str], Getter]  # of an operand, as a PTX type


def constant(op: Imm, kind: str) -> np.ndarray:
    """A literal as an array (1, 1) of a PTX type."""
    bits = TYPE_BITS[kind]
    if op.float_bits:
        pattern = np.array([[op.value]], UNSIGNED[op.float_bits])
        if op.float_bits == bits:
            return pattern.view(dtype_of(kind))
        return pattern.view(FLOAT[op.float_bits]).astype(dtype_of(kind))
    if kind == "pred":
        return np.array([[bool(op.value)]])
    return np.array([[op.value & ((1 << bits) - 1)]], UNSIGNED[bits]).view(dtype_of(kind))


def getter(op: Operand, kind: str, names: Callable[[str], Getter]) -> Getter:
    """A reader of ``op`` as PTX type ``kind``. ``names`` gives readers of special registers and symbols."""
    if isinstance(op, Not):
        inner = getter(op.of, kind, names)
        return lambda m: ~inner(m)
    if isinstance(op, Imm):
        value = constant(op, kind)
        return lambda m: value
    if isinstance(op, Sym):
        return _converted(names(op.name), kind)
    if not isinstance(op, Reg):
        raise UnsupportedPTX(f"operand {op!r}")
    return _register(op, kind)


def _converted(inner: Getter, kind: str) -> Getter:
    dtype, bits = dtype_of(kind), TYPE_BITS[kind]

    def read(m: Any) -> np.ndarray:
        x = inner(m)
        return x.astype(UNSIGNED[bits]).view(dtype) if x.dtype.itemsize * 8 != bits else x.view(dtype)

    return read


def _register(op: Reg, kind: str) -> Getter:
    i, bits = op.index, TYPE_BITS[kind]
    if op.bits == 1:
        return lambda m: m.registers[i]
    dtype, unsigned = dtype_of(kind), UNSIGNED[bits]
    if op.bits == bits:
        return (lambda m: m.registers[i]) if dtype is unsigned else (lambda m: m.registers[i].view(dtype))
    if op.bits < bits and kind[0] == "s":  # a narrower register is extended by its sign
        narrow = SIGNED[op.bits]
        return lambda m: m.registers[i].view(narrow).astype(dtype)
    return lambda m: m.registers[i].astype(unsigned).view(dtype)
