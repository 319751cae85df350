"""Shared memory of the CTAs that run in lockstep. Shadows say which bytes were written and read, by whom and when."""

from typing import Any

import numpy as np

from triton_proof.machine.layout import PATTERN, SHARED_BASE, WORDS

# Who read a granule last: a thread; WARP - warp for threads of one warp; MANY for threads of several warps.
WARP, MANY = -1, -1000


class SharedMemory:
    """``size`` bytes for each of ``ctas`` CTAs, one after the other in ``data``. granule: bytes of a shadow's entry."""

    def __init__(self, machine: Any, ctas: int, size: int, granule: int) -> None:
        self.m, self.size, self.granule = machine, size, granule
        self.stride = max(16, (size + 15) // 16 * 16)  # bytes from one CTA to the next
        self.data = np.full(ctas * self.stride, PATTERN, np.uint8)
        if machine.checks:
            n = ctas * self.stride // granule
            self.written = np.zeros(n, bool)
            self.write_step, self.read_step = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
            self.write_thread, self.read_thread = np.zeros(n, np.int16), np.zeros(n, np.int16)
            self.copied = np.zeros(n, bool)  # written last by cp.async, not by a store
            self.being_read = np.zeros(n, np.int16)  # by wgmma instructions that are not waited for yet
            self.arriving = np.zeros(n, np.int16)  # by cp.async instructions that are not waited for yet
            self.last_barrier = np.zeros(ctas, np.int32)
            self.last_warp_sync = np.zeros((ctas, machine.warps), np.int32)
            self.last_fence = np.full((ctas, machine.threads), -1, np.int32)

    def rows(self, size: int, n: int) -> np.ndarray:
        """The memory as rows of n words of ``size`` bytes."""
        return self.data.view(WORDS[size]).reshape(-1, n)

    def granules(self, offsets: np.ndarray, total: int) -> np.ndarray:
        """Entries of the shadows (accesses, entries of one) for accesses of ``total`` bytes."""
        return (offsets // self.granule)[:, None] + np.arange(max(1, total // self.granule))

    def offsets(
        self, ins: Any, cta: np.ndarray, addresses: np.ndarray, total: int, thread: np.ndarray, verb: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offsets into ``data`` of accesses of ``total`` bytes, and which are good. Bad ones are reported."""
        at = addresses.astype(np.int64) - SHARED_BASE
        outside = (at < 0) | (at + total > self.size)
        if outside.any():
            k = int(np.flatnonzero(outside)[0])
            self.m.find(
                "out-of-bounds", ins,
                f"{verb} of {total} bytes at byte {int(at[k])} of {self.size} of shared memory, thread "
                f"{int(thread[k])} of CTA {self.m.first_cta + int(cta[k])}", int(outside.sum()),
            )  # fmt: skip
        skewed = ~outside & ((at & (total - 1)) != 0)
        if skewed.any():
            k = int(np.flatnonzero(skewed)[0])
            self.m.find(
                "misaligned", ins, f"{verb} of {total} bytes at byte {int(at[k])} of shared memory", int(skewed.sum())
            )
        good = ~outside & ~skewed
        return np.where(good, cta * self.stride + at, 0), good

    def note_load(
        self, ins: Any, offsets: np.ndarray, total: int, cta: np.ndarray, thread: np.ndarray, by_warp: bool = False
    ) -> None:
        """Check and note loads of ``total`` bytes. by_warp: the warp reads together (ldmatrix)."""
        at, t = self.granules(offsets, total), thread[:, None].astype(np.int16)
        barrier = self._check_order(ins, at, offsets, cta, thread, "load", None)
        unwritten = ~self.written[at]
        if unwritten.any():
            self._report("uninitialised", ins, unwritten, offsets, cta, thread, "load of bytes that nobody wrote")
        warp = t >> 5
        code = (WARP - warp) if by_warp else t
        before, fresh = self.read_thread[at], self.read_step[at] <= barrier
        reader = np.where(fresh | (before == code), code, np.where(_warp(before) == warp, WARP - warp, MANY))
        reader = reader.astype(np.int16)
        self.read_thread[at] = reader
        for _ in range(2):  # lanes of this instruction that read the same granule: one warp, then many
            seen = self.read_thread[at]
            clash = seen != reader
            if not clash.any():
                break
            reader = np.where(clash, np.where(_warp(seen) == warp, WARP - warp, MANY), reader).astype(np.int16)
            self.read_thread[at[clash]] = reader[clash]
        self.read_thread[at[self.read_thread[at] != reader]] = MANY
        self.read_step[at] = self.m.step

    def note_store(
        self, ins: Any, offsets: np.ndarray, total: int, cta: np.ndarray, thread: np.ndarray,
        same: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Check and note stores of ``total`` bytes. same: for each, whether it leaves the bytes as they were."""
        at, t = self.granules(offsets, total), thread[:, None].astype(np.int16)
        barrier = self._check_order(ins, at, offsets, cta, thread, "store", same)
        if self.being_read[at].any():
            text = "store to bytes that an unfinished wgmma reads"
            self._report("async", ins, self.being_read[at] > 0, offsets, cta, thread, text)
        reader = self.read_thread[at]
        hazard = (self.read_step[at] > barrier) & (reader != t)
        hazard &= (_warp(reader) != t >> 5) | (self.read_step[at] > self._warp_sync(cta, thread))
        if same is not None:
            hazard &= ~same[:, None]
        if hazard.any():
            text = "store to bytes that another thread loaded since the last barrier"
            self._report("race", ins, hazard, offsets, cta, thread, text, reader)
        self.written[at], self.copied[at] = True, False
        self.write_step[at], self.write_thread[at] = self.m.step, t

    def _check_order(
        self, ins: Any, at: np.ndarray, offsets: np.ndarray, cta: np.ndarray, thread: np.ndarray, verb: str,
        same: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Report accesses of bytes that are still arriving or that another thread stored since the last barrier.

        Returns the step of each CTA's last barrier.
        """
        if self.arriving[at].any():
            text = f"{verb} of bytes that an unfinished cp.async writes"
            self._report("async", ins, self.arriving[at] > 0, offsets, cta, thread, text)
        t, barrier = thread[:, None].astype(np.int16), self.last_barrier[cta][:, None]
        step, writer = self.write_step[at], self.write_thread[at]
        hazard = (step > barrier) & (writer != t)
        hazard &= (writer >> 5 != t >> 5) | (step > self._warp_sync(cta, thread))
        if same is not None:
            hazard &= ~same[:, None]
        if hazard.any():
            text = f"{verb} of bytes that another thread stored since the last barrier"
            self._report("race", ins, hazard, offsets, cta, thread, text, writer)
        return barrier

    def _warp_sync(self, cta: np.ndarray, thread: np.ndarray) -> np.ndarray:
        return self.last_warp_sync[cta, thread >> 5][:, None]

    def _report(
        self, kind: str, ins: Any, bad: np.ndarray, offsets: np.ndarray, cta: np.ndarray, thread: np.ndarray,
        what: str, others: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        k, j = (int(x) for x in np.argwhere(bad)[0])
        mine, pair = int(thread[k]), ""
        if others is not None:
            other = int(others[k, j])
            pair = f", other thread {other}" if other >= 0 else ", several other threads"
            if other >= 0 and other >> 5 == mine >> 5:
                pair += " of the same warp"
        byte = int(offsets[k]) - int(cta[k]) * self.stride + j * self.granule
        where = f"byte {byte} of shared memory, thread {mine} of CTA {self.m.first_cta + int(cta[k])}"
        self.m.find(kind, ins, f"{what}: {where}{pair}", int(bad.any(1).sum()))


def _warp(reader: np.ndarray) -> np.ndarray:
    """Warp of a reader; a large number for several warps."""
    return np.where(reader >= 0, reader >> 5, WARP - reader)
