"""Atomic operations, one lane after the other, in the order of CTAs and threads."""

from collections.abc import Callable
from typing import Any

import numpy as np

from triton_proof.machine.access import route
from triton_proof.machine.layout import WORDS
from triton_proof.scalar.formats import bf16_to_f32, dtype_of, f32_to_bf16

OPERATIONS: dict[str, Callable[..., Any]] = {  # new value from the old one and the operands
    "exch": lambda old, x: x, "cas": lambda old, wanted, x: x if old == wanted else old,
    "add": lambda old, x: old + x, "min": min, "max": max,
    "and": lambda old, x: old & x, "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x,
}  # fmt: skip


def atomic(
    m: Any, ins: Any, space: str, address: np.ndarray, operands: list[np.ndarray], mask: Any, kind: str,
    operation: str,
) -> np.ndarray:  # fmt: skip
    """Old values (CTAs, threads) in the dtype of PTX type ``kind``. Races with other accesses are not looked for."""
    space, address = route(space, address)
    shape, dtype = (m.ctas, m.threads), dtype_of(kind)
    size = np.dtype(dtype).itemsize
    addresses, values = m.full(address).reshape(-1), [m.full(v).reshape(-1) for v in operands]
    out = np.zeros(m.ctas * m.threads, WORDS[size])
    change = _add_bf16 if kind == "bf16" else OPERATIONS[operation]
    m.step += 1
    m.atomic = True
    try:
        for lane in m.all_lanes(m.lanes(mask, shape)[0]):
            one = np.array([lane])
            where, at, offsets = addresses[one], (one, shape), one
            if space == "shared":
                cta, thread = m.cta_and_thread(one)
                offsets, good = m.shared.offsets(ins, cta, where, size, thread, "atomic")
                if not good[0]:
                    continue
                cell = m.shared.rows(size, 1)[offsets // size]
            else:
                cell = m.memory.load(ins, where, size, 1, at)
            new = change(cell.view(dtype)[0, 0], *(v[lane] for v in values))
            row = np.array([[new]], dtype).view(WORDS[size])
            if space == "shared":
                m.shared.rows(size, 1)[offsets // size] = row
            else:
                m.memory.store(ins, where, row, size, 1, at)
            out[lane] = cell[0, 0]
    finally:
        m.atomic = False
    return out.reshape(shape).view(dtype)


def _add_bf16(old: np.ndarray, x: np.ndarray) -> np.ndarray:
    return f32_to_bf16(bf16_to_f32(np.array([old])) + bf16_to_f32(np.array([x], np.uint16)))[0]
