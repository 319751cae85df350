"""Matrix products of a warp: ``mma.sync.aligned.m16n8k*.row.col``.

Products are summed in float64 and rounded once to the accumulator's type. A GPU keeps fewer bits in between, so the
result is the best that a tensor core could give.
"""

import re
from typing import Any

import numpy as np

from triton_proof.program.fragments import decode
from triton_proof.program.memory import items
from triton_proof.program.steps import Step
from triton_proof.ptx.syntax import Instruction, UnsupportedPTX

_NAME = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.satfinite)?\.(f32|s32)\.(\w+)\.(\w+)\.(f32|s32)")


def build(program: Any, ins: Instruction) -> Step:
    """Step that executes an ``mma`` instruction, D = A B + C. Raises UnsupportedPTX for another form.

    Of registers a0 to a3 and b0, b1, A is [[a0, a2], [a1, a3]] and B transposed is [b0, b1], in blocks of 8 rows.
    """
    found = _NAME.fullmatch(ins.opcode)
    if not found:
        raise UnsupportedPTX(ins.opcode)
    k, total, kind_a, kind_b = int(found[1]), found[2], found[3], found[4]
    d, a, b, c = (items(op) for op in ins.operands)
    a_readers, b_readers = ([program.get(x, "b32") for x in op] for op in (a, b))
    c_readers = [program.get(x, total) for x in c]
    dtype = np.float32 if total == "f32" else np.int32

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        left = _matrix(m, a_readers, kind_a, quarters=len(a) == 4)
        right = _matrix(m, b_readers, kind_b, rows=8)
        product = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # (warps, half, g, t, pair)
        out = []
        for i, read in enumerate(c_readers):
            part = product[:, i >> 1, :, :, i & 1].reshape(m.ctas, m.threads)
            out.append((part + read(m)).astype(dtype).view(np.uint32))
        m.add_flops(2 * 16 * 8 * k, mask)
        return out

    return program.write(d, ins, run)


def _matrix(m: Any, readers: list[Any], kind: str, quarters: bool = False, rows: int = 16) -> np.ndarray:
    """The matrix (warps, rows, k) that fragments hold. It is kept for other products of the basic block."""
    registers = [read(m) for read in readers]
    key = (kind, rows, *(id(r) for r in registers))
    if key not in m.fragments:
        parts = [decode(m.by_warp(r).reshape(-1, 8, 4), kind) for r in registers]
        if quarters:
            whole = np.concatenate([np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)], 2)
        else:
            whole = np.concatenate(parts, axis=1 if rows == 16 else 2)
        m.fragments[key] = whole, registers  # the registers are kept, so that no other array gets their id
    return m.fragments[key][0]
