"""Arithmetic, and the way from any scalar instruction to the function that computes it.

Approximate instructions (``ex2.approx``, ``div.full``) are computed in float64 and rounded once. So they are at least
as exact as on a GPU.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS, Instruction, UnsupportedPTX
from triton_proof.scalar import compare, conversions, integers, logic, packed
from triton_proof.scalar.form import Form
from triton_proof.scalar.formats import SIGNED, UNSIGNED, dtype_of, flush, fma_f32
from triton_proof.scalar.operands import Getter, Reader


def build(ins: Instruction, get: Reader) -> Getter:
    """Function of the machine that computes the value of a scalar instruction. Raises UnsupportedPTX.

    get: makes readers of operands.
    """
    if ins.name == "cvt":
        return conversions.build(ins, get)
    form = Form(ins, get)
    if form.kind in ("u16x2", "s16x2"):
        return packed.integers(form)
    if form.halves and ins.name in ("add", "sub", "mul", "fma", "min", "max", "neg", "abs"):
        return packed.floats(form)
    if ins.name not in _BUILDERS:
        raise UnsupportedPTX(ins.opcode)
    return _BUILDERS[ins.name](form)


def _sum(form: Form) -> Getter:
    a, b = form.read_flushed(2)
    function = operator.add if form.name == "add" else operator.sub
    return form.finish(lambda m: function(a(m), b(m)))


def _product(form: Form) -> Getter:
    a, b = form.read_flushed(2)
    if "wide" in form.parts:
        wide = _wide(form)
        return lambda m: a(m).astype(wide) * b(m).astype(wide)
    if "hi" in form.parts:
        return lambda m: integers.high(a(m), b(m))
    return form.finish(lambda m: a(m) * b(m))


def _multiply_add(form: Form) -> Getter:
    if "wide" in form.parts:
        (a, b), wide = form.read(2), _wide(form)
        c = form.get(form.ops[3], form.kind[0] + str(2 * TYPE_BITS[form.kind]))
        return lambda m: a(m).astype(wide) * b(m).astype(wide) + c(m)
    a, b, c = form.read_flushed(3)
    if form.kind == "f32":
        return form.finish(lambda m: fma_f32(a(m), b(m), c(m)))
    if "hi" in form.parts:
        return lambda m: integers.high(a(m), b(m)) + c(m)
    return lambda m: a(m) * b(m) + c(m)  # float64 is rounded twice


def _wide(form: Form) -> Any:
    return (SIGNED if form.kind[0] == "s" else UNSIGNED)[2 * TYPE_BITS[form.kind]]


def _quotient(form: Form) -> Getter:
    a, b = form.read_flushed(2)
    if form.floating:
        return form.finish(lambda m: a(m) / b(m))
    return lambda m: integers.trunc_div(a(m), b(m))


def _remainder(form: Form) -> Getter:
    a, b = form.read(2)
    return lambda m: integers.remainder(a(m), b(m))


def _extreme(form: Form) -> Getter:
    """Minimum or maximum of two or three values. A NaN operand is left out unless the name says ``NaN``."""
    least = form.name == "min"
    if form.floating and "NaN" not in form.parts:
        function = np.fmin if least else np.fmax
    else:
        function = np.minimum if least else np.maximum
    a, b, *more = form.read_flushed(len(form.ops) - 1)
    if more:
        return form.finish(lambda m: function(function(a(m), b(m)), more[0](m)))
    return form.finish(lambda m: function(a(m), b(m)))


def _negative(form: Form) -> Getter:
    (a,) = form.read(1)
    if not form.floating:
        return lambda m: np.zeros((), dtype_of(form.kind)) - a(m)
    bits = TYPE_BITS[form.kind]
    sign = UNSIGNED[bits](1 << (bits - 1))
    return form.finish(lambda m: (a(m).view(sign.dtype) ^ sign).view(dtype_of(form.kind)))


def _absolute(form: Form) -> Getter:
    (a,) = form.read(1)
    return form.finish(lambda m: np.abs(a(m)))


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1.0 / x, "rsqrt": lambda x: 1.0 / np.sqrt(x), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


def _function(form: Form) -> Getter:
    (a,) = form.read(1)
    function = _FUNCTIONS[form.name]
    if form.kind == "f64":
        return lambda m: function(a(m))
    if form.kind != "f32":
        raise UnsupportedPTX(form.ins.opcode)
    if form.ftz:
        return form.finish(lambda m: function(flush(a(m)).astype(np.float64)).astype(np.float32))
    return form.finish(lambda m: function(a(m).astype(np.float64)).astype(np.float32))


_BUILDERS: dict[str, Callable[[Form], Getter]] = {
    **dict.fromkeys(("add", "sub"), _sum), "mul": _product, **dict.fromkeys(("fma", "mad"), _multiply_add),
    "div": _quotient, "rem": _remainder, **dict.fromkeys(("min", "max"), _extreme), "neg": _negative,
    "abs": _absolute, **dict.fromkeys(_FUNCTIONS, _function), **logic.BUILDERS, **compare.BUILDERS,
}  # fmt: skip
