"""Instructions on bits: logic, shifts, fields, counts, and the choice between two values."""

import operator
from collections.abc import Callable

import numpy as np

from triton_proof.ptx.syntax import TYPE_BITS, Imm, UnsupportedPTX
from triton_proof.scalar import integers
from triton_proof.scalar.form import Form
from triton_proof.scalar.formats import dtype_of
from triton_proof.scalar.operands import Getter


def _binary(form: Form) -> Getter:
    a, b = form.read(2)
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[form.name]
    return lambda m: function(a(m), b(m))


def _not(form: Form) -> Getter:
    (a,) = form.read(1)
    return lambda m: ~a(m)


def _logical_not(form: Form) -> Getter:
    (a,) = form.read(1)
    return lambda m: (a(m) == 0).astype(dtype_of(form.kind))


def _shift(form: Form) -> Getter:
    a, count = form.get(form.ops[1], form.kind), form.get(form.ops[2], "u32")
    left, amount = form.name == "shl", form.ops[2]
    if isinstance(amount, Imm) and 0 <= amount.value < TYPE_BITS[form.kind]:
        n, function = dtype_of(form.kind)(amount.value), np.left_shift if left else np.right_shift
        return lambda m: function(a(m), n)
    return lambda m: integers.shift(a(m), count(m), left)


def _funnel(form: Form) -> Getter:
    low, high = form.read(2, "b32")
    count, left, wrap = form.get(form.ops[3], "u32"), "l" in form.parts, "wrap" in form.parts
    return lambda m: integers.funnel(low(m), high(m), count(m), left, wrap)


def _lop3(form: Form) -> Getter:
    a, b, c = form.read(3, "b32")
    table = form.ops[4]
    if not isinstance(table, Imm):
        raise UnsupportedPTX(form.ins.text)
    return lambda m: integers.lop3(a(m), b(m), c(m), table.value)


def _prmt(form: Form) -> Getter:
    a, b, c = form.read(3, "b32")
    return lambda m: integers.prmt(a(m), b(m), c(m))


def _bfe(form: Form) -> Getter:
    a, position, length = form.get(form.ops[1], form.kind), *(form.get(x, "u32") for x in form.ops[2:4])
    p, n = form.ops[2:4]
    if form.kind == "u32" and isinstance(p, Imm) and isinstance(n, Imm) and p.value < 32:
        first, mask = np.uint32(p.value), np.uint32((1 << min(n.value, 32)) - 1)
        return lambda m: (a(m) >> first) & mask
    return lambda m: integers.bfe(a(m), position(m), length(m))


def _bfi(form: Form) -> Getter:
    a, b = form.read(2)
    position, length = (form.get(x, "u32") for x in form.ops[3:5])
    return lambda m: integers.bfi(a(m), b(m), position(m), length(m))


def _count(form: Form) -> Getter:
    if form.name == "bfind" and form.kind[0] == "s":
        raise UnsupportedPTX(form.ins.opcode)
    (a,) = form.read(1)
    bits = np.uint32(TYPE_BITS[form.kind])
    if form.name == "popc":
        return lambda m: np.bitwise_count(a(m)).astype(np.uint32)
    if form.name == "clz":
        return lambda m: bits - integers.bit_length(a(m))
    return lambda m: integers.bit_length(a(m)) - np.uint32(1)


def _reverse(form: Form) -> Getter:
    (a,) = form.read(1)
    return lambda m: integers.brev(a(m))


def _select(form: Form) -> Getter:
    a, b = form.read(2)
    p = form.get(form.ops[3], "pred")
    return lambda m: np.where(p(m), a(m), b(m))


def _copysign(form: Form) -> Getter:
    sign, size = form.read(2)
    return lambda m: np.copysign(size(m), sign(m))


BUILDERS: dict[str, Callable[[Form], Getter]] = {
    **dict.fromkeys(("and", "or", "xor"), _binary), "not": _not, "cnot": _logical_not,
    **dict.fromkeys(("shl", "shr"), _shift), "shf": _funnel, "lop3": _lop3, "prmt": _prmt, "bfe": _bfe, "bfi": _bfi,
    **dict.fromkeys(("popc", "clz", "bfind"), _count), "brev": _reverse, "selp": _select, "copysign": _copysign,
}  # fmt: skip
