"""Global memory with the checks of a sanitizer.

It is the process's own memory. An address is good if it lies inside a tensor that the launch was given.
"""

import ctypes
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np

from triton_proof.machine.global_races import Shadows, check
from triton_proof.machine.layout import PATTERN, WORDS

Lanes = tuple[np.ndarray | None, tuple[int, int]]


class Allocation:
    """Bytes [start, end) that a launch may access. ``granule``: bytes of an element, at most 4."""

    def __init__(self, start: int, end: int, name: str, granule: int, uninitialised: bool = False) -> None:
        self.start, self.end, self.name, self.granule = start, end, name, granule
        self.uninitialised = uninitialised
        self.base = start & ~15
        length = max(((end + 15) & ~15) - self.base, 16)
        self.raw = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.base))
        self._rows: dict[tuple[int, int], np.ndarray] = {}
        self._shadows: Shadows | None = None

    def rows(self, size: int, n: int) -> np.ndarray:
        """The memory as rows of n words of ``size`` bytes."""
        if (size, n) not in self._rows:
            whole = len(self.raw) // (size * n) * (size * n)
            self._rows[size, n] = self.raw[:whole].view(WORDS[size]).reshape(-1, n)
        return self._rows[size, n]

    def shadows(self) -> Shadows:
        if self._shadows is None:
            self._shadows = Shadows(len(self.raw) // self.granule + 1)
        return self._shadows

    def gap(self, address: int) -> int:
        """Bytes between an address outside and the nearest byte inside."""
        return self.start - address if address < self.start else address - self.end + 1


class GlobalMemory:
    """The allocations of one launch. An address in none of them is reported and not accessed."""

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self.allocations: list[Allocation] = []
        self.starts: list[int] = []

    def add(self, start: int, end: int, name: str, granule: int, uninitialised: bool = False) -> None:
        """Add bytes [start, end). Arguments that overlap become one allocation."""
        if end <= start:
            return
        for i, other in enumerate(self.allocations):
            if start < other.end and other.start < end:
                del self.allocations[i], self.starts[i]
                self.add(
                    min(start, other.start), max(end, other.end), f"{other.name}+{name}",
                    min(granule, other.granule), uninitialised and other.uninitialised,
                )  # fmt: skip
                return
        at = bisect_right(self.starts, start)
        self.starts.insert(at, start)
        self.allocations.insert(at, Allocation(start, end, name, granule, uninitialised))

    def load(self, ins: Any, addresses: np.ndarray, size: int, n: int, lanes: Lanes) -> np.ndarray:
        """Words (len(addresses), n) of ``size`` bytes at the addresses of the active lanes; zeros at bad ones."""
        out = np.zeros((len(addresses), n), WORDS[size])
        for allocation, chosen in self._allocations_of(ins, addresses, size * n, lanes, "load"):
            offsets = (addresses[chosen] - np.uint64(allocation.base)).astype(np.int64)
            words = allocation.rows(size, n)[offsets // (size * n)]
            out[chosen] = words
            if self.m.checks:
                if allocation.uninitialised:
                    self._check_written(ins, allocation, addresses, chosen, words, lanes)
                check(self.m, ins, allocation, offsets, size * n, self._who(lanes, chosen), write=False)
        return out

    def store(self, ins: Any, addresses: np.ndarray, values: np.ndarray, size: int, n: int, lanes: Lanes) -> None:
        """Store words (len(addresses), n) of ``size`` bytes at the addresses of the active lanes."""
        for allocation, chosen in self._allocations_of(ins, addresses, size * n, lanes, "store"):
            offsets = (addresses[chosen] - np.uint64(allocation.base)).astype(np.int64)
            rows, at, words = allocation.rows(size, n), offsets // (size * n), values[chosen]
            same = (rows[at] == words).all(1) if self.m.checks else None
            rows[at] = words
            if self.m.checks:
                lost = (rows[at] != words).any(1)
                if lost.any():
                    k = _index(chosen, int(np.flatnonzero(lost)[0]))
                    self.m.find(
                        "global-race", ins,
                        f"lanes of one instruction store different values at {allocation.name}[byte "
                        f"{int(addresses[k]) - allocation.start}], among them {self._thread(lanes, k)}",
                        int(lost.sum()),
                    )  # fmt: skip
                check(self.m, ins, allocation, offsets, size * n, self._who(lanes, chosen), write=True, same=same)

    def _check_written(
        self, ins: Any, allocation: Allocation, addresses: np.ndarray, chosen: Any, words: np.ndarray, lanes: Lanes
    ) -> None:
        size = words.dtype.itemsize
        bad = (words == WORDS[size](int.from_bytes(bytes([PATTERN]) * size, "little"))).any(1)
        if bad.any():
            k = _index(chosen, int(np.flatnonzero(bad)[0]))
            self.m.find(
                "uninitialised", ins,
                f"load of {allocation.name}[byte {int(addresses[k]) - allocation.start}], which nobody wrote, by "
                f"{self._thread(lanes, k)}", int(bad.sum()),
            )  # fmt: skip

    def _allocations_of(
        self, ins: Any, addresses: np.ndarray, total: int, lanes: Lanes, verb: str
    ) -> Iterator[tuple[Allocation, Any]]:
        """(allocation, index of its addresses) for all good addresses of ``total`` bytes; bad ones are reported."""
        good = (addresses & np.uint64(total - 1)) == 0
        if not good.all():
            k = int(np.flatnonzero(~good)[0])
            by = f"{verb} of {total} bytes at {int(addresses[k]):#x} by {self._thread(lanes, k)}"
            self.m.find("misaligned", ins, by, int((~good).sum()))
            if not good.any():
                return
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self._find(low)
        if good.all() and allocation is not None and low >= allocation.start and high + total <= allocation.end:
            yield allocation, slice(None)
            return
        which = np.searchsorted(np.array(self.starts, np.uint64), addresses, side="right").astype(np.int64) - 1
        ends = np.array([0, *(x.end for x in self.allocations)], np.uint64)[which + 1]
        inside = addresses + np.uint64(total) <= ends
        if (good & ~inside).any():
            bad = np.flatnonzero(good & ~inside)
            described = f"{verb} of {total} bytes: {self._describe(int(addresses[bad[0]]), total)}"
            self.m.find("out-of-bounds", ins, f"{described}, by {self._thread(lanes, int(bad[0]))}", len(bad))
        for i in np.unique(which[good & inside]):
            yield self.allocations[int(i)], np.flatnonzero(good & inside & (which == i))

    def _find(self, address: int) -> Allocation | None:
        at = bisect_right(self.starts, address) - 1
        return self.allocations[at] if at >= 0 and address < self.allocations[at].end else None

    def _describe(self, address: int, total: int) -> str:
        if not self.allocations:
            return f"address {address:#x}; the launch has no tensors"
        near = min(self.allocations, key=lambda x: x.gap(address))
        if address < near.start:
            side = f"starts {near.start - address} bytes before the start of"
        else:
            side = f"ends {address + total - near.end} bytes past the end of"
        return f"it {side} {near.name} ({near.end - near.start} bytes)"

    def _who(self, lanes: Lanes, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        """CTA of the grid and thread of each chosen lane; thread -1 where a whole CTA goes to one address."""
        positions, (ctas, threads) = lanes
        flat = (np.arange(ctas * threads) if positions is None else positions)[chosen]
        cta = self.m.first_cta + (flat // threads if ctas > 1 else np.zeros(len(flat), np.int64))
        return cta, flat % threads if threads > 1 else np.full(len(flat), -1, np.int64)

    def _thread(self, lanes: Lanes, k: int) -> str:
        cta, thread = self._who(lanes, slice(k, k + 1))
        return f"thread {max(0, int(thread[0]))} of CTA {int(cta[0])}"


def _index(chosen: Any, k: int) -> int:
    return k if isinstance(chosen, slice) else int(chosen[k])
