"""Asynchronous copies: ``cp.async`` from global to shared memory.

A copy reads its bytes at once, and they land when they are waited for, the latest that a GPU could. So a missing wait
gives old data, and a finding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from triton_proof.machine.counters import count_global, count_shared_lanes


@dataclass
class _Copy:
    """Copies of one instruction: for each lane the place, the bytes, and its commit group; ``open`` until they land."""

    lanes: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    size: int
    group: np.ndarray
    open: np.ndarray


class Copies:
    """Copies of the CTAs that run, and the number of groups that each thread has committed."""

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self.committed = np.zeros((machine.ctas, machine.threads), np.int32)
        self._copies: list[_Copy] = []

    def start(self, ins: Any, to: np.ndarray, of: np.ndarray, mask: Any, size: int, counts: np.ndarray | None) -> None:
        """Copy ``size`` bytes a thread. counts: bytes to read of them, the rest are zeros; None reads all."""
        m = self.m
        shape = (m.ctas, m.threads)
        lanes = m.all_lanes(m.lanes(mask, shape)[0])
        if not len(lanes):
            return
        m.step += 1
        source = m.full(of).reshape(-1)[lanes]
        n = np.full(len(lanes), size) if counts is None else m.full(counts).reshape(-1)[lanes].astype(np.int64)
        rows = np.zeros((len(lanes), size), np.uint8)
        for amount in np.unique(n[n > 0]):
            which = np.flatnonzero(n == amount)
            at = (lanes[which], shape)
            if amount == size:
                words = m.memory.load(ins, source[which], 4, size // 4, at)
            else:
                steps = np.arange(amount, dtype=np.uint64)
                words = np.concatenate([m.memory.load(ins, source[which] + i, 1, 1, at) for i in steps], 1)
            rows[which, :amount] = np.ascontiguousarray(words).view(np.uint8).reshape(len(which), -1)
        if m.counting and (n > 0).any():
            count_global(m, "global load", ins, source[n > 0], size, lanes[n > 0], shape)
        cta, thread = m.cta_and_thread(lanes)
        offsets, good = m.shared.offsets(ins, cta, m.full(to).reshape(-1)[lanes], size, thread, "cp.async")
        offsets, rows, lanes, cta, thread = (x[good] for x in (offsets, rows, lanes, cta, thread))
        if m.checks:
            m.shared.note_store(ins, offsets, size, cta, thread)
            np.add.at(m.shared.arriving, m.shared.granules(offsets, size), 1)
        if m.counting:
            count_shared_lanes(m, "shared store", ins, offsets, lanes, size)
        group = self.committed.reshape(-1)[lanes]
        self._copies.append(_Copy(lanes, offsets, rows, size, group, np.ones(len(lanes), bool)))

    def commit(self, mask: Any) -> None:
        """Close the group of the active threads."""
        self.committed += 1 if mask is None else self.m.full(mask)

    def wait(self, mask: Any, keep: int) -> None:
        """Land the copies of the active threads, but for those of the ``keep`` latest groups."""
        shared = self.m.shared
        active = np.ones(self.committed.size, bool) if mask is None else self.m.full(mask).reshape(-1)
        done = self.committed.reshape(-1) - keep
        self.m.step += 1
        for copy in self._copies:
            ready = copy.open & active[copy.lanes] & (copy.group < done[copy.lanes])
            if not ready.any():
                continue
            offsets = copy.offsets[ready]
            shared.data.reshape(-1, copy.size)[offsets // copy.size] = copy.rows[ready]
            if self.m.checks:
                at = shared.granules(offsets, copy.size)
                np.subtract.at(shared.arriving, at, 1)
                shared.write_step[at] = self.m.step
                shared.write_thread[at] = (copy.lanes[ready] % self.m.threads).astype(np.int16)[:, None]
                shared.written[at] = shared.copied[at] = True
            copy.open &= ~ready
        self._copies = [copy for copy in self._copies if copy.open.any()]
