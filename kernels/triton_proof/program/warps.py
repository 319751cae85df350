"""Steps of instructions in which the threads of a warp exchange values."""

from typing import Any

import numpy as np

from triton_proof.program.steps import Step
from triton_proof.ptx.syntax import Instruction, Pair, UnsupportedPTX

_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def shuffle(program: Any, ins: Instruction) -> Step:
    mode, to = ins.parts[2], ins.operands[0]
    targets = [to.first, to.second] if isinstance(to, Pair) else [to]
    value, lane_operand, limits = (program.get(x, "b32") for x in ins.operands[1:4])

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        x = m.by_warp(value(m))
        b = (m.by_warp(lane_operand(m)) & np.uint32(31)).astype(np.int64)
        c = m.by_warp(limits(m)).astype(np.int64)
        lane, segment = np.arange(32), c >> 8 & 31
        limit = (lane & segment) | (c & 31 & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[mode]
        inside = source >= limit if mode == "up" else source <= limit
        out = np.take_along_axis(x, np.where(inside, source, lane), axis=1)
        results = [out, inside] if len(targets) == 2 else [out]
        return [r.reshape(m.ctas, m.threads) for r in results]

    return program.write(targets, ins, run)


def vote(program: Any, ins: Instruction) -> Step:
    mode = next((p for p in ("ballot", "any", "all") if p in ins.parts), None)
    if mode is None:
        raise UnsupportedPTX(ins.opcode)
    predicate = program.get(ins.operands[1], "pred")

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        x, active = m.by_warp(predicate(m)), _active(m, mask)
        if mode == "ballot":
            return [_for_all(m, _bits(x & active))]
        return [_for_all(m, (x & active).any(1) if mode == "any" else (x | ~active).all(1))]

    return program.write([ins.operands[0]], ins, run)


def reduce(program: Any, ins: Instruction) -> Step:
    operation = next((f for name, f in _REDUCTIONS.items() if name in ins.parts), None)
    if operation is None:
        raise UnsupportedPTX(ins.opcode)
    value = program.get(ins.operands[1], ins.parts[-1])

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        x = m.by_warp(value(m))
        return [_for_all(m, operation.reduce(x, axis=1, dtype=x.dtype))]

    return program.write([ins.operands[0]], ins, run)


def active(program: Any, ins: Instruction) -> Step:
    return program.write([ins.operands[0]], ins, lambda m, mask: [_for_all(m, _bits(_active(m, mask)))])


def elect(program: Any, ins: Instruction) -> Step:
    to = ins.operands[0]
    targets = [to.first, to.second] if isinstance(to, Pair) else [to]

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        return [m.full(m.zero), m.full((m.tid & np.uint32(31)) == 0)][: len(targets)]

    return program.write(targets, ins, run)


def _active(m: Any, mask: Any) -> np.ndarray:
    return np.ones((m.ctas * m.warps, 32), bool) if mask is None else m.by_warp(mask)


def _bits(x: np.ndarray) -> np.ndarray:
    """bool (warps, 32) as one word a warp, lane 0 lowest."""
    return (x.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)


def _for_all(m: Any, of_warp: np.ndarray) -> np.ndarray:
    """One value a warp, for all of its threads."""
    return np.repeat(of_warp, 32).reshape(m.ctas, m.threads)
