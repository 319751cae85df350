"""From a parsed instruction to the step that executes it."""

from typing import Any

import numpy as np

from triton_proof.machine.layout import LOCAL_WINDOW, SHARED_WINDOW
from triton_proof.program import fragments, memory, mma, warps, wgmma
from triton_proof.program.analysis import NO_EFFECT
from triton_proof.program.steps import SPACES, Step
from triton_proof.ptx.syntax import TYPE_BITS, Imm, Instruction, Pair, Reg, UnsupportedPTX, Vec
from triton_proof.scalar import arithmetic
from triton_proof.scalar.formats import UNSIGNED, pattern

_BUILDERS = {
    "ld": memory.load, "ldu": memory.load, "st": memory.store, "atom": memory.atomic, "red": memory.atomic,
    "cp": memory.copy_async, "ldmatrix": fragments.load, "stmatrix": fragments.store, "mma": mma.build,
    "shfl": warps.shuffle, "vote": warps.vote, "redux": warps.reduce, "activemask": warps.active, "elect": warps.elect,
}  # fmt: skip


def build_step(program: Any, ins: Instruction) -> Step | None:
    """The step of an instruction that does not end a block; None if it does nothing here. Raises UnsupportedPTX."""
    if ins.name in _BUILDERS:
        return _BUILDERS[ins.name](program, ins)
    if ins.name == "mov":
        return _move(program, ins)
    if ins.name == "cvta":
        return _convert_address(program, ins)
    if ins.name == "wgmma":
        return _wgmma(program, ins)
    if ins.name == "bar" and ins.parts[1] == "warp":

        def warp_barrier(m: Any, mask: Any) -> None:
            m.whole_warps(ins, mask)
            m.warp_barrier(mask)

        return warp_barrier
    if ins.name == "fence" and "proxy" in ins.parts:
        return lambda m, mask: m.proxy_fence(mask)
    if ins.name == "createpolicy":
        return program.write([ins.operands[0]], ins, lambda m, mask: [np.zeros((1, 1), np.uint64)])
    if ins.name in NO_EFFECT:
        return None
    return _scalar(program, ins)


def _wgmma(program: Any, ins: Instruction) -> Step | None:
    if "mma_async" in ins.parts:
        return wgmma.build(program, ins)
    if "commit_group" in ins.parts:
        return lambda m, mask: m.products.commit()
    if "wait_group" in ins.parts:
        keep = ins.operands[-1]
        if not isinstance(keep, Imm):
            raise UnsupportedPTX(ins.text)
        return lambda m, mask: m.products.wait(keep.value)
    return None  # wgmma.fence orders registers, which are never late here


def _scalar(program: Any, ins: Instruction) -> Step:
    value, to = arithmetic.build(ins, program.get), ins.operands[0]
    if isinstance(to, Pair):  # a predicate and its negation
        if len(ins.operands) > 3:
            raise UnsupportedPTX(ins.text)

        def both(m: Any, mask: Any) -> list[np.ndarray]:
            x = value(m)
            return [x, ~x]

        return program.write([to.first, to.second], ins, both)
    if isinstance(to, Reg) and ins.predicate is None and to.index in program.local_registers:
        i, bits = to.index, to.bits

        def unmasked(m: Any, mask: Any) -> None:
            m.registers[i] = pattern(value(m), bits)

        return unmasked
    return program.write([to], ins, lambda m, mask: [value(m)])


def _move(program: Any, ins: Instruction) -> Step:
    to, of = ins.operands
    if isinstance(of, Vec) and isinstance(to, Reg):  # pack, lowest first
        bits = to.bits // len(of.items)
        readers, dtype = [program.get(x, f"u{bits}") for x in of.items], UNSIGNED[to.bits]

        def pack(m: Any, mask: Any) -> list[np.ndarray]:
            out = np.zeros((1, 1), np.uint64)
            for i, read in enumerate(readers):
                out = out | (read(m).astype(np.uint64) << np.uint64(i * bits))
            return [out.astype(dtype)]

        return program.write([to], ins, pack)
    kind = ins.parts[-1]
    if isinstance(to, Vec):  # unpack
        bits = TYPE_BITS[kind] // len(to.items)
        whole = program.get(of, f"u{TYPE_BITS[kind]}")

        def unpack(m: Any, mask: Any) -> list[np.ndarray]:
            x = whole(m)
            return [(x >> x.dtype.type(i * bits)).astype(UNSIGNED[bits]) for i in range(len(to.items))]

        return program.write(list(to.items), ins, unpack)
    read = program.get(of, kind)
    return program.write([to], ins, lambda m, mask: [read(m)])


def _convert_address(program: Any, ins: Instruction) -> Step:
    """``cvta``: between an address in a space and a generic address."""
    space = next((s for p in ins.parts for s in SPACES if p == s or p.startswith(f"{s}::")), "global")
    window = {"local": LOCAL_WINDOW, "shared": SHARED_WINDOW}.get(space, 0)
    read = program.get(ins.operands[1], "u64")
    offset = np.uint64((-window if "to" in ins.parts else window) % (1 << 64))
    return program.write([ins.operands[0]], ins, lambda m, mask: [read(m) + offset])
