"""Steps of loads, stores, atomic operations and asynchronous copies."""

from typing import Any

import numpy as np

from triton_proof.machine import access, atomics
from triton_proof.machine.layout import WORDS
from triton_proof.program.analysis import space_of, type_of
from triton_proof.program.steps import SPACES, Step
from triton_proof.ptx.syntax import TYPE_BITS, Imm, Instruction, Mem, Operand, Reg, Sym, UnsupportedPTX, Vec
from triton_proof.scalar.formats import dtype_of

_PLAIN = {"nc", "v2", "v4", "v8", "volatile", "relaxed", "acquire", "release", "weak", "cta", "gpu", "sys", "ca", "cg",
          "cs", "lu", "cv", "wb", "wt", "unified"}  # fmt: skip


def items(op: Operand) -> list[Operand]:
    """Elements of a vector operand, or the operand alone."""
    return list(op.items) if isinstance(op, Vec) else [op]


def number(op: Operand, ins: Instruction) -> int:
    """Value of a literal operand. Raises UnsupportedPTX for any other."""
    if not isinstance(op, Imm):
        raise UnsupportedPTX(ins.text)
    return op.value


def load(program: Any, ins: Instruction) -> Step:
    _refuse_unknown(ins)
    space, kind, to = space_of(ins), type_of(ins), items(ins.operands[0])
    size, dtype = TYPE_BITS[kind] // 8, dtype_of(kind)
    address = program.address(ins.operands[1])
    if space == "param":
        return program.write(to, ins, _parameter(program, ins, size, len(to), dtype))

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        return [x.view(dtype) for x in access.load(m, ins, space, address(m), mask, size, len(to))]

    return program.write(to, ins, run)


def _parameter(program: Any, ins: Instruction, size: int, n: int, dtype: Any) -> Any:
    """Words of the parameter memory, at an address that is known now or chosen at run time."""
    place = ins.operands[1]
    assert isinstance(place, Mem)
    if isinstance(place.base, Sym):
        at = program.params[place.base.name].offset + place.offset

        def known(m: Any, mask: Any) -> list[np.ndarray]:
            words = m.params[at : at + size * n].view(WORDS[size])
            return [words[i : i + 1].reshape(1, 1).view(dtype) for i in range(n)]

        return known
    address = program.address(place)

    def chosen(m: Any, mask: Any) -> list[np.ndarray]:
        at = np.minimum(address(m).astype(np.int64), len(m.params) - size * n)
        words = np.ascontiguousarray(m.params[at[..., None] + np.arange(size * n)]).view(WORDS[size])
        return [words[..., i].view(dtype) for i in range(n)]

    return chosen


def store(program: Any, ins: Instruction) -> Step:
    _refuse_unknown(ins)
    space, size = space_of(ins), TYPE_BITS[type_of(ins)] // 8
    address = program.address(ins.operands[0])
    readers = [program.get(x, f"u{size * 8}") for x in items(ins.operands[1])]

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        access.store(m, ins, space, address(m), [read(m) for read in readers], mask, size)
        return []

    return program.write([], ins, run)


def _refuse_unknown(ins: Instruction) -> None:
    """Raise UnsupportedPTX for a load or store that does more than move a value."""
    for p in ins.parts[1:]:
        space = p.split("::")[0] in SPACES and not p.endswith("::cluster")
        if not (space or p in TYPE_BITS or p in _PLAIN or p.startswith(("L1::", "L2::"))):
            raise UnsupportedPTX(f"{ins.opcode}: {p}")


def atomic(program: Any, ins: Instruction) -> Step:
    space, kind = space_of(ins), type_of(ins)
    operation = next((p for p in ins.parts[1:] if p in (*atomics.OPERATIONS, "inc", "dec")), "")
    vector = any(p in ("v2", "v4", "v8") for p in ins.parts)
    whole = kind[0] in "bus" and kind != "bf16"
    if operation not in atomics.OPERATIONS or vector or kind.endswith("x2") or not (whole or operation == "add"):
        raise UnsupportedPTX(ins.opcode)
    without_result = ins.name == "red"
    place, *operands = ins.operands if without_result else ins.operands[1:]
    address, readers = program.address(place), [program.get(x, kind) for x in operands]

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        values = [read(m) for read in readers]
        old = atomics.atomic(m, ins, space, address(m), values, mask, kind, operation)
        return [] if without_result else [old]

    return program.write([] if without_result else [ins.operands[0]], ins, run)


def copy_async(program: Any, ins: Instruction) -> Step:
    name, ops = ins.opcode, ins.operands
    if name == "cp.async.commit_group":
        return lambda m, mask: m.copies.commit(mask)
    if name == "cp.async.wait_group":
        keep = number(ops[0], ins)
        return lambda m, mask: m.copies.wait(mask, keep)
    if name == "cp.async.wait_all":

        def wait_all(m: Any, mask: Any) -> None:
            m.copies.commit(mask)
            m.copies.wait(mask, 0)

        return wait_all
    if not name.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
        raise UnsupportedPTX(name)
    to, of, size = program.address(ops[0]), program.address(ops[1]), number(ops[2], ins)
    has_count = len(ops) > 3 and not (name.endswith("cache_hint") and isinstance(ops[3], Reg) and ops[3].bits == 64)
    counts = program.get(ops[3], "u32") if has_count else None

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.copies.start(ins, to(m), of(m), mask, size, None if counts is None else counts(m))
        return []

    return program.write([], ins, run)
