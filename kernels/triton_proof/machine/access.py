"""Loads and stores of every memory space."""

from typing import Any

import numpy as np

from triton_proof.machine.counters import count_global, count_shared_lanes
from triton_proof.machine.layout import LOCAL_WINDOW, SHARED_WINDOW, WORDS


def load(m: Any, ins: Any, space: str, address: np.ndarray, mask: Any, size: int, n: int) -> list[np.ndarray]:
    """n words of ``size`` bytes at ``address`` of the active threads; zeros for the others and at bad addresses."""
    space, address = route(space, address)
    if space == "local":
        at = _local_offsets(m, ins, address, mask, size * n)
        words = np.ascontiguousarray(m.local[np.arange(len(at))[:, None], at]).view(WORDS[size])
        return [words[:, i].reshape(m.ctas, m.threads) for i in range(n)]
    lanes, shape = m.lanes(mask, _shape(m, space, address.shape))
    addresses = np.broadcast_to(address, shape).reshape(-1)
    if lanes is not None:
        addresses = addresses[lanes]
    out = np.zeros((shape[0] * shape[1], n), WORDS[size])
    if len(addresses):
        if space == "shared":
            words = _load_shared(m, ins, addresses, m.all_lanes(lanes), size, n)
        else:
            words = m.memory.load(ins, addresses, size, n, (lanes, shape))
            _note_mask(m, ins, lanes)
            if m.counting:
                count_global(m, "global load", ins, addresses, size * n, lanes, shape)
        m.step += 1
        out[slice(None) if lanes is None else lanes] = words
    return [out[:, i].reshape(shape) for i in range(n)]


def store(m: Any, ins: Any, space: str, address: np.ndarray, values: list[np.ndarray], mask: Any, size: int) -> None:
    """Store words of ``size`` bytes at ``address`` for the active threads."""
    space, address = route(space, address)
    if space == "local":
        _store_local(m, ins, address, values, mask, size)
        return
    lanes, shape = m.lanes(mask, _shape(m, space, np.broadcast_shapes(address.shape, *(v.shape for v in values))))
    addresses = np.broadcast_to(address, shape).reshape(-1)
    rows = np.empty((len(addresses), len(values)), WORDS[size])
    for i, value in enumerate(values):
        rows[:, i] = np.broadcast_to(value, shape).reshape(-1)
    if lanes is not None:
        addresses, rows = addresses[lanes], rows[lanes]
    if not len(addresses):
        return
    m.step += 1
    if space == "shared":
        _store_shared(m, ins, addresses, rows, m.all_lanes(lanes))
    elif space == "global":
        m.memory.store(ins, addresses, rows, size, len(values), (lanes, shape))
        _note_mask(m, ins, lanes)
        if m.counting:
            count_global(m, "global store", ins, addresses, size * len(values), lanes, shape)
    else:
        m.find("out-of-bounds", ins, f"store to {space} memory", len(addresses))


def _note_mask(m: Any, ins: Any, lanes: np.ndarray | None) -> None:
    if ins.predicate is not None:
        m.launch.masks[ins.where] |= lanes is not None


def route(space: str, address: np.ndarray) -> tuple[str, np.ndarray]:
    """Space and address in it of a generic address; others as they are."""
    if space != "generic":
        return space, address
    top = int(address.flat[0])
    if top & LOCAL_WINDOW:
        return "local", address - np.uint64(LOCAL_WINDOW)
    if top & SHARED_WINDOW:
        return "shared", address - np.uint64(SHARED_WINDOW)
    return "global", address


def _shape(m: Any, space: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if space == "shared":
        return m.ctas, m.threads
    # One address for all CTAs is still an access of each.
    return (m.ctas, *shape[1:])


def _load_shared(m: Any, ins: Any, addresses: np.ndarray, lanes: np.ndarray, size: int, n: int) -> np.ndarray:
    cta, thread = m.cta_and_thread(lanes)
    offsets, good = m.shared.offsets(ins, cta, addresses, size * n, thread, "load")
    words = np.where(good[:, None], m.shared.rows(size, n)[offsets // (size * n)], 0).astype(WORDS[size])
    if m.checks:
        m.shared.note_load(ins, offsets[good], size * n, cta[good], thread[good])
    if m.counting:
        count_shared_lanes(m, "shared load", ins, offsets, lanes, size * n)
    return words


def _store_shared(m: Any, ins: Any, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
    cta, thread = m.cta_and_thread(lanes)
    n, size = values.shape[1], values.dtype.itemsize
    total = n * size
    offsets, good = m.shared.offsets(ins, cta, addresses, total, thread, "store")
    offsets, values, cta, thread, lanes = (x[good] for x in (offsets, values, cta, thread, lanes))
    rows, at = m.shared.rows(size, n), offsets // total
    if m.checks:
        m.shared.note_store(ins, offsets, total, cta, thread, (rows[at] == values).all(1))
    rows[at] = values
    if m.checks:
        lost = (rows[at] != values).any(1)
        if lost.any():
            byte = int(offsets[np.flatnonzero(lost)[0]]) % m.shared.stride
            text = f"lanes of one instruction store different values at byte {byte} of shared memory"
            kind = "reduction-bits" if id(ins) in m.program.of_reductions else "race"
            m.find(kind, ins, text, int(lost.sum()))
    if m.counting:
        count_shared_lanes(m, "shared store", ins, offsets, lanes, total)


def _local_offsets(m: Any, ins: Any, address: np.ndarray, mask: Any, total: int) -> np.ndarray:
    """Bytes (threads of all CTAs, total) within each thread's local memory; clamped, and reported, outside of it."""
    at = m.full(address).astype(np.int64).reshape(-1)
    bad = (at < 0) | (at + total > m.program.local_size)
    if mask is not None:
        bad &= m.full(mask).reshape(-1)
    if bad.any():
        m.find("out-of-bounds", ins, "access outside of local memory", int(bad.sum()))
    return np.clip(at, 0, m.local.shape[1] - total)[:, None] + np.arange(total)


def _store_local(m: Any, ins: Any, address: np.ndarray, values: list[np.ndarray], mask: Any, size: int) -> None:
    at = _local_offsets(m, ins, address, mask, size * len(values))
    rows = np.stack([m.full(v).reshape(-1) for v in values], 1).astype(WORDS[size])
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    active = np.ones(len(at), bool) if mask is None else m.full(mask).reshape(-1)
    m.local[np.flatnonzero(active)[:, None], at[active]] = raw[active]
