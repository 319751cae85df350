"""Counters of memory traffic: sectors of global memory, and passes over the banks of shared memory. No caches."""

from typing import Any

import numpy as np

from triton_proof.report import SECTOR

BANKS = 32  # each gives one word of 4 bytes a pass


def count_global(
    m: Any, space: str, ins: Any, addresses: np.ndarray, size: int, lanes: np.ndarray | None, shape: tuple[int, int]
) -> None:
    """Count requests, bytes and sectors of accesses of ``size`` bytes by the active lanes within ``shape``."""
    record = m.launch.accesses[space, ins.where, ins.text]
    if shape[1] == 1:  # one address a CTA: every warp asks for it
        requests = len(addresses) * m.warps
        record.add(requests=requests, units=requests, ideal=requests, bytes=requests * size)
        return
    warp = (np.arange(shape[0] * shape[1]) if lanes is None else lanes) // 32
    place = (addresses - addresses.min()).astype(np.int64)
    sector = (addresses // np.uint64(SECTOR)).astype(np.int64)
    sector -= sector.min()
    distinct = len(np.unique(warp * (int(place.max()) + 1) + place))
    record.add(
        requests=len(np.unique(warp)),
        units=len(np.unique(warp * (int(sector.max()) + 1) + sector)),
        ideal=-(-distinct * size // SECTOR),
        bytes=distinct * size,
    )


def count_shared_lanes(m: Any, space: str, ins: Any, offsets: np.ndarray, lanes: np.ndarray, size: int) -> None:
    """Count bank passes of accesses of ``size`` bytes a lane.

    The lanes of a warp go together for up to 4 bytes a lane, in halves for 8 bytes, and in quarters for 16.
    """
    together = 32 if size <= 4 else 128 // size
    grid = np.full(m.ctas * m.threads, -1, np.int64)
    grid[lanes] = offsets
    phases = grid.reshape(-1, together)
    count_shared(m, space, ins, phases[(phases >= 0).any(1)], size)


def count_shared(m: Any, space: str, ins: Any, phases: np.ndarray, size: int) -> None:
    """Count bank passes. phases (n, lanes): offsets of lanes that go together, -1 for none."""
    n = len(phases)
    if n == 0:
        return
    words = (phases // 4)[:, :, None] + np.arange(max(1, size // 4))
    words = np.sort(np.where(phases[:, :, None] < 0, -1, words).reshape(n, -1), axis=1)
    fresh = words >= 0
    fresh[:, 1:] &= words[:, 1:] != words[:, :-1]
    banks = np.where(fresh, words % BANKS, 0) + BANKS * np.arange(n)[:, None]
    of_bank = np.bincount(banks[fresh], minlength=BANKS * n).reshape(n, BANKS)
    m.launch.accesses[space, ins.where, ins.text].add(
        requests=n, units=int(of_bank.max(1).sum()), ideal=n, bytes=int(fresh.sum()) * min(size, 4)
    )
