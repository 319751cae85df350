"""Fragments of matrices in registers: their decoding, and ``ldmatrix`` and ``stmatrix``.

A fragment register of a warp is (warps, 32). Lane 4 g + t holds row g and columns from t on of a matrix of 8 rows.
"""

import re
from typing import Any

import numpy as np

from triton_proof.machine.counters import count_shared
from triton_proof.program.memory import items
from triton_proof.program.steps import Step
from triton_proof.ptx.syntax import Instruction, UnsupportedPTX
from triton_proof.scalar.formats import bf16_to_f32

_NAME = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
TF32_MASK = np.uint32(0xFFFFE000)  # the unit reads 10 bits of mantissa and ignores the 13 below


def decode(x: np.ndarray, kind: str) -> np.ndarray:
    """Registers (n, ..., lanes) uint32 as numbers (n, ..., lanes * elements of a register) float64."""
    x = np.ascontiguousarray(x)
    if kind == "bf16":
        return bf16_to_f32(x.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return x.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (x & TF32_MASK).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return x.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    raise UnsupportedPTX(f"matrix operands of type {kind}")


class _Rows:
    """Addresses of the rows of an instruction: lane i of an active warp names row i of its ``count`` matrices."""

    def __init__(self, m: Any, ins: Instruction, address: np.ndarray, mask: Any, count: int) -> None:
        warps = m.active_warps(mask)
        self.warps = np.arange(m.ctas * m.warps) if warps is None else np.flatnonzero(warps)
        addresses = m.by_warp(address)[self.warps, : 8 * count].reshape(-1)
        self.cta = np.repeat(self.warps // m.warps, 8 * count)
        self.thread = (self.warps[:, None] % m.warps * 32 + np.arange(8 * count)).reshape(-1)
        self.offsets, self.good = m.shared.offsets(ins, self.cta, addresses, 16, self.thread, ins.name)


def load(program: Any, ins: Instruction) -> Step:
    count, transposed = _parse(ins)
    to, address = items(ins.operands[0]), program.address(ins.operands[1])

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        rows = _Rows(m, ins, address(m), mask, count)
        words = m.shared.rows(4, 4)[rows.offsets >> 4].reshape(-1, count, 8, 4)
        if m.checks:
            m.step += 1
            good = rows.good
            m.shared.note_load(ins, rows.offsets[good], 16, rows.cta[good], rows.thread[good], by_warp=True)
        if m.counting:
            count_shared(m, "shared load", ins, rows.offsets.reshape(-1, 8), 16)
        words = _transpose(words) if transposed else words
        out = np.zeros((count, m.ctas * m.warps, 32), np.uint32)
        out[:, rows.warps] = words.transpose(1, 0, 2, 3).reshape(count, -1, 32)
        return [part.reshape(m.ctas, m.threads) for part in out]

    return program.write(to, ins, run)


def store(program: Any, ins: Instruction) -> Step:
    count, transposed = _parse(ins)
    address, readers = program.address(ins.operands[0]), [program.get(x, "b32") for x in items(ins.operands[1])]

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        words = np.stack([m.by_warp(read(m)).reshape(-1, 8, 4) for read in readers], axis=1)
        words = _transpose(words) if transposed else words
        rows = _Rows(m, ins, address(m), mask, count)
        good = rows.good
        offsets, values = rows.offsets[good], words[rows.warps].reshape(-1, 4)[good]
        memory, at = m.shared.rows(4, 4), offsets >> 4
        if m.checks:
            m.step += 1
            m.shared.note_store(ins, offsets, 16, rows.cta[good], rows.thread[good], (memory[at] == values).all(1))
        memory[at] = values
        if m.counting and good.all():
            count_shared(m, "shared store", ins, offsets.reshape(-1, 8), 16)
        return []

    return program.write([], ins, run)


def _parse(ins: Instruction) -> tuple[int, bool]:
    """Number of matrices, and whether they are transposed."""
    found = _NAME.fullmatch(ins.opcode)
    if not found:
        raise UnsupportedPTX(ins.opcode)
    return int(found[2]), bool(found[3])


def _transpose(words: np.ndarray) -> np.ndarray:
    """Matrices (n, count, 8, 4) of words as those of their transposes in 16-bit elements."""
    n, count = words.shape[:2]
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(n, count, 8, 8)
    return np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(np.uint32).reshape(n, count, 8, 4)
