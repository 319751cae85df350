"""Matrix products of a warpgroup: ``wgmma.mma_async`` with operands in shared memory or registers.

Products are computed when they are issued, summed in float64 and rounded once to float32.
"""

import re
from typing import Any

import numpy as np

from triton_proof.machine.layout import SHARED_BASE
from triton_proof.program.fragments import TF32_MASK, decode
from triton_proof.program.memory import items, number
from triton_proof.program.steps import Step
from triton_proof.ptx.syntax import Instruction, Reg, UnsupportedPTX, Vec
from triton_proof.scalar.formats import bf16_to_f32

_NAME = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.(bf16|f16|tf32)")
# Bytes of an atom along the contiguous dimension, by the swizzle mode of a descriptor.
_ATOM = {0: 16, 1: 128, 2: 64, 3: 32}


def swizzled(address: np.ndarray, mode: int, base: int = 0) -> np.ndarray:
    """Physical address of a byte: bits 4.. are xored with bits 7.. of the address.

    mode 0 leaves addresses alone; 1, 2 and 3 swizzle 128, 64 and 32 bytes. base: where the pattern begins, in units of
    128 bytes.
    """
    if mode == 0:
        return address
    return address ^ ((((address >> 7) - base) & (_ATOM[mode] // 16 - 1)) << 4)


def operand_addresses(descriptor: int, rows: int, k: int, size: int, rows_contiguous: bool) -> np.ndarray:
    """Addresses (rows, k) in shared memory of the elements of an operand. Rows are those of A, or columns of B.

    size: bytes of an element. The layouts are those of the PTX manual, "Shared Memory Matrix Layout": along the
    contiguous dimension an atom holds 16, 32, 64 or 128 bytes, and 8 atoms lie one after the other.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62 & 3
    width = _ATOM[mode]
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    byte, across = (r * size, c) if rows_contiguous else (c * size, r)
    inside = byte % width + across % 8 * width
    if mode == 0 and rows_contiguous:
        logical = start + byte // width * stride + across // 8 * leading + inside
    elif mode == 0 or rows_contiguous:
        logical = start + byte // width * leading + across // 8 * stride + inside
    else:  # the whole of k lies in one atom
        logical = start + across // 8 * stride + across % 8 * width + byte
    return swizzled(np.broadcast_to(logical, (rows, k)), mode, descriptor >> 49 & 7)


def build(program: Any, ins: Instruction) -> Step:
    """Step that executes a ``wgmma`` instruction: D = A B + D, or D = A B where the predicate ``scale-d`` is false."""
    found = _NAME.fullmatch(ins.opcode)
    if not found or found[3] != found[4]:
        raise UnsupportedPTX(ins.opcode)
    n, k, kind = int(found[1]), int(found[2]), found[3]
    d, a, b, scale, *flags = ins.operands
    sign_a, sign_b, *transposed = (number(x, ins) for x in flags)
    if isinstance(a, Vec):
        in_registers, a_descriptor = [program.get(x, "b32") for x in a.items], None
    else:
        in_registers, a_descriptor = [], program.get(a, "b64")
    b_descriptor, to = program.get(b, "b64"), items(d)
    results = {r.index for r in to if isinstance(r, Reg)}
    totals = [program.get(x, "f32") for x in to]
    adds = program.get(scale, "pred")
    rows_of_a_contiguous = bool(transposed[0]) if len(transposed) == 2 else False
    columns_contiguous = bool(transposed[-1]) if transposed else False

    def run(m: Any, mask: Any) -> list[np.ndarray]:
        m.whole_warps(ins, mask)
        warps = m.active_warps(mask)
        groups = m.ctas * m.groups
        live = np.ones(groups, bool) if warps is None else warps.reshape(groups, 4).any(1)
        if m.checks:
            m.step += 1
        if a_descriptor is None:
            parts = [decode(m.by_warp(read(m)).reshape(-1, 8, 4), kind) for read in in_registers]
            halves = [np.concatenate(parts[:2], 1), np.concatenate(parts[2:], 1)]
            left = np.concatenate(halves, 2).reshape(groups, 64, k)
        else:
            left = _from_shared(m, ins, a_descriptor(m), (64, k), kind, rows_of_a_contiguous, live)
        right = _from_shared(m, ins, b_descriptor(m), (n, k), kind, columns_contiguous, live)
        product = np.matmul(left, right.transpose(0, 2, 1)) * (sign_a * sign_b)
        product = product.reshape(groups, 4, 2, 8, n // 8, 4, 2)  # (group, warp, half, g, block of 8, t, pair)
        keep, out = adds(m), []
        for j, read in enumerate(totals):
            part = product[:, :, (j >> 1) & 1, :, j >> 2, :, j & 1].reshape(m.ctas, m.threads)
            out.append((part + np.where(keep, read(m), np.float32(0))).astype(np.float32).view(np.uint32))
        m.add_flops(2 * 64 * n * k // 4, mask)
        if m.checks:
            m.products.note_results(results)
        return out

    return program.write(to, ins, run)


def _from_shared(
    m: Any, ins: Instruction, descriptors: np.ndarray, shape: tuple[int, int], kind: str, rows_contiguous: bool,
    live: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Operand (warpgroups, rows, k) in float64 that each live warpgroup's descriptor names; NaN out of bounds."""
    of_group = m.full(descriptors).reshape(m.ctas * m.groups, 128)
    if (of_group != of_group[:, :1])[live].any():
        m.find("warp", ins, "descriptors differ within a warpgroup", 1)
    of_group, size = of_group[:, 0], 4 if kind == "tf32" else 2
    out = np.zeros((len(of_group), *shape))
    for descriptor in np.unique(of_group[live]):
        who = np.flatnonzero((of_group == descriptor) & live)
        offsets = operand_addresses(int(descriptor), *shape, size, rows_contiguous) - SHARED_BASE
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > m.shared.size:
            text = f"wgmma operand reaches from byte {low} to {high} of {m.shared.size} of shared memory"
            m.find("out-of-bounds", ins, text, 1)
            out[who] = np.nan
            continue
        cta = who // m.groups
        raw = m.shared.rows(size, 1)[:, 0][(cta[:, None, None] * m.shared.stride + offsets[None]) // size]
        if kind == "bf16":
            out[who] = bf16_to_f32(raw)
        else:
            out[who] = raw.view(np.float16) if kind == "f16" else (raw & TF32_MASK).view(np.float32)
        if m.checks:
            m.products.note_operand(ins, who, np.unique(offsets // m.shared.granule))
    return out
