"""Races in global memory: two accesses of a launch to one element, of which one stores, with nothing between them.

``global-race`` is between CTAs, ``race`` between threads of one CTA without a barrier.
"""

from typing import Any, NamedTuple

import numpy as np

SEVERAL = -3  # as a thread: several threads of one CTA read the element
MANY_CTAS = -1  # as a CTA: several CTAs read the element


class Shadows:
    """Last store and last load of each granule of memory, the bytes of an element: CTA + 1 (0: none), step, thread."""

    def __init__(self, granules: int) -> None:
        self.writer, self.reader = np.zeros(granules, np.int32), np.zeros(granules, np.int32)
        self.write_step, self.read_step = np.zeros(granules, np.int32), np.zeros(granules, np.int32)
        self.write_thread, self.read_thread = np.zeros(granules, np.int16), np.zeros(granules, np.int16)


class _Access(NamedTuple):
    """Granules (lanes, granules of an access), and the CTA + 1, thread and last barrier of each."""

    at: np.ndarray
    cta: np.ndarray
    thread: np.ndarray
    barrier: np.ndarray
    step: int


def check(
    machine: Any, ins: Any, allocation: Any, offsets: np.ndarray, total: int, who: tuple[np.ndarray, np.ndarray], *,
    write: bool, same: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Report and note accesses of ``total`` bytes at ``offsets``. Atomic accesses are left out.

    Accesses narrower than the allocation's element are not followed. same: for each access, whether a store leaves the
    bytes as they were; threads of one CTA may do that.
    """
    g = allocation.granule
    if machine.atomic or total % g:
        return
    cta, thread = who
    at = (offsets // g)[:, None] + np.arange(total // g)
    columns = (x[:, None] for x in (cta + 1, thread, machine.shared.last_barrier[cta - machine.first_cta]))
    ctas, threads, barriers = (np.broadcast_to(x, at.shape) for x in columns)
    access = _Access(at, ctas.astype(np.int32), threads.astype(np.int16), barriers, machine.step)
    shadows = allocation.shadows()
    same_bytes = None if same is None else same[:, None]
    between_ctas, inside_ctas = _store(shadows, access, same_bytes) if write else _load(shadows, access)

    def place(hit: np.ndarray) -> str:
        k = int(np.argwhere(hit)[0][0])
        byte = int(offsets[k]) + allocation.base - allocation.start
        by = f"CTA {int(cta[k])}"
        return f"at {allocation.name}[byte {byte}], by " + (by if thread[k] < 0 else f"thread {int(thread[k])} of {by}")

    for what, hit, other in between_ctas:
        if hit.any():
            theirs = int(other[tuple(np.argwhere(hit)[0])]) - 1
            by = f"CTA {theirs}" if theirs >= 0 else "several CTAs"
            machine.find("global-race", ins, f"{what} by another CTA ({by}) {place(hit)}", int(hit.any(1).sum()))
            break
    for what, hit in inside_ctas:
        if hit.any():
            text = f"{what} by another thread of the CTA with no barrier in between {place(hit)}"
            machine.find("race", ins, text, int(hit.any(1).sum()))
            break


Found = tuple[list[tuple[str, np.ndarray, np.ndarray]], list[tuple[str, np.ndarray]]]


def _load(shadows: Shadows, x: _Access) -> Found:
    writer = shadows.writer[x.at]
    by_cta = (writer != 0) & (writer != x.cta)
    by_thread = _unordered(shadows.write_thread, shadows.write_step, writer, x)
    reader = shadows.reader[x.at]
    # Remember one reader, or that there are several.
    earlier = (reader == x.cta) & (shadows.read_step[x.at] > x.barrier)
    thread = np.where(earlier & (shadows.read_thread[x.at] != x.thread), SEVERAL, x.thread).astype(np.int16)
    shadows.read_thread[x.at] = thread
    shadows.read_thread[x.at[shadows.read_thread[x.at] != thread]] = SEVERAL
    shadows.read_step[x.at] = x.step
    cta = np.where((reader == 0) | (reader == x.cta), x.cta, MANY_CTAS)
    shadows.reader[x.at] = cta
    shadows.reader[x.at[shadows.reader[x.at] != cta]] = MANY_CTAS
    return [("load after a store", by_cta, writer)], [("load after a store", by_thread)]


def _store(shadows: Shadows, x: _Access, same: np.ndarray | None) -> Found:
    writer, reader = shadows.writer[x.at], shadows.reader[x.at]
    after_store, after_load = (writer != 0) & (writer != x.cta), (reader != 0) & (reader != x.cta)
    by_store = _unordered(shadows.write_thread, shadows.write_step, writer, x)
    by_load = _unordered(shadows.read_thread, shadows.read_step, reader, x)
    if same is not None:
        by_store, by_load = by_store & ~same, by_load & ~same
    shadows.writer[x.at] = x.cta
    shadows.write_step[x.at], shadows.write_thread[x.at] = x.step, x.thread
    stored = shadows.writer[x.at]
    return (
        [
            ("store after a store", after_store, writer),
            ("store after a load", after_load, reader),
            ("store beside a store", stored != x.cta, stored),
        ],
        [("store after a store", by_store), ("store after a load", by_load)],
    )


def _unordered(threads: np.ndarray, steps: np.ndarray, ctas: np.ndarray, x: _Access) -> np.ndarray:
    """Mask of the accesses before which another thread of the same CTA came last, since the last barrier."""
    return (ctas == x.cta) & (threads[x.at] != x.thread) & (steps[x.at] > x.barrier)
