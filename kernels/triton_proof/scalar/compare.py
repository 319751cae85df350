"""Comparisons: ``setp`` and ``testp``."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from triton_proof.ptx.syntax import UnsupportedPTX
from triton_proof.scalar.form import ORDERED, UNORDERED, Form
from triton_proof.scalar.formats import FLOATS, bf16_to_f32, flush
from triton_proof.scalar.operands import Getter

_FUNCTIONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def _setp(form: Form) -> Getter:
    """Predicate of a comparison, joined with a third operand where the name says ``and``, ``or`` or ``xor``."""
    if form.kind in ("f16x2", "bf16x2"):
        raise UnsupportedPTX(form.ins.opcode)
    x, y = form.read(2)

    def operands(m: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = x(m), y(m)
        if form.kind == "bf16":
            a, b = bf16_to_f32(a), bf16_to_f32(b)
        return (flush(a), flush(b)) if form.ftz else (a, b)

    compare = _comparison(form)
    joins = [p for p in form.parts[2:] if p in ("and", "or", "xor")]
    if not joins:
        return lambda m: compare(*operands(m))
    join = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[joins[0]]
    third = form.get(form.ops[3], "pred")
    return lambda m: join(compare(*operands(m)), third(m))


def _comparison(form: Form) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    name = form.parts[1]
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name in UNORDERED:  # true for NaN
        function = _FUNCTIONS[name.removesuffix("u")]
        return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)
    if name not in ORDERED:
        raise UnsupportedPTX(form.ins.opcode)
    function = _FUNCTIONS[name]
    if name == "ne" and form.kind in FLOATS:  # Python's != is true for NaN
        return lambda a, b: function(a, b) & ~np.isnan(a) & ~np.isnan(b)
    return function


def _testp(form: Form) -> Getter:
    (a,) = form.read(1)
    tests: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x),
    }  # fmt: skip
    test = tests[form.parts[1]]
    return lambda m: test(a(m))


BUILDERS: dict[str, Callable[[Form], Getter]] = {"setp": _setp, "testp": _testp}
