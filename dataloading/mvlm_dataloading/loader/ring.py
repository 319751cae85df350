"""Samples of linked data that a rank is about to use: asked for ahead of time, block by block, and kept until used.

The order (`mvlm_dataloading.loader.lanes`) says which block a position needs, and which positions need the rest of the
block. So each block is read once, by as few ranges as its samples lie in, and a sample leaves memory with its batch.

Shape legend: n samples of a request.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.links.samples import AskedRows, AskedSamples, LinkedSample, LinkReader
from mvlm_dataloading.links.store import RangeStore

from .lanes import LaneOrder

IN_FLIGHT = 64
"""Ranges that the ranks of a node read at a time, if they are at most eight."""
AHEAD_S = 10.0
"""Seconds of training whose samples are asked for in advance, at most those of an epoch."""
AHEAD_SAMPLES = 1024
"""Samples of a rank that are asked for in advance, at least."""
AHEAD_BYTES = 512 << 20
"""Bytes of blocks that a rank has asked for and not begun, at which it asks for nothing in advance any more. The
samples of begun blocks are in memory beside them: half of the order's pool in the mean, 1 GB of all ranks."""
_RATE_BATCHES = 32


def ranges_at_a_time(ranks: int) -> int:
    """Ranges that a rank reads at a time, of `ranks`: its share of `IN_FLIGHT` among the ranks of its node, at least 8.

    torchrun says in LOCAL_WORLD_SIZE how many these are. Without it all ranks are taken for one node's.
    """
    return max(8, IN_FLIGHT // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


class _Block(NamedTuple):
    asked: AskedSamples | AskedRows
    ids: list[int]
    positions: list[int]
    """Positions of the samples `ids`."""


class Ring:
    """Samples at the positions of one rank, from `start` on. One thread uses it.

    Args:
        links: reader of the samples of `dataset`.
        start: first position.
        step: positions of a batch of all ranks.
        own: positions, int64 (n,) -> bool (n,): True for those of this rank.
        ranks: number of ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        links: LinkReader,
        order: LaneOrder,
        start: int,
        step: int,
        own: Callable[[Int64], NDArray[np.bool_]],
        ranks: int,
    ):
        self._links, self._order, self._own = links, order, own
        self._offset, self._first = dataset.start, links.index.first  # ids count from the data set's first sample
        self._start, self._step, self._ranks, self._size = start, step, ranks, len(dataset)
        self._store = RangeStore(ranges_at_a_time(ranks))
        self._planned = start  # positions before it have been asked for
        self._blocks: dict[int, _Block] = {}  # by position, those whose bytes are not taken apart yet
        self._samples: dict[int, tuple[int, LinkedSample]] = {}  # by position: id and sample
        self._by_id: dict[int, LinkedSample] = {}
        self._bytes = 0  # of the samples in `_blocks`
        self._times = deque[tuple[float, int]](maxlen=_RATE_BATCHES)

    def take(self, positions: Int64, ids: Int64) -> list[LinkedSample]:
        """Samples at ascending positions. An id that is not the one of the order is read by itself.

        Raises:
            DataError: a file cannot be read, or is not the one that was linked.
        """
        self._look_ahead(int(positions[-1]))
        found = []
        for position, i in zip(positions.tolist(), ids.tolist(), strict=True):
            if position in self._blocks:
                self._open(self._blocks[position])
            ordered, sample = self._samples[position]
            found.append(sample if ordered == i else self.find(i))
        return found

    def find(self, i: int) -> LinkedSample:
        """Sample i, from memory if it is there."""
        return self._by_id.get(i) or self._links.one(self._offset + i)

    def release(self, position: int) -> None:
        """Forget the samples before a position. They come first, because positions are asked for in order."""
        for old in [one for one in self._samples if one < position]:
            self._by_id.pop(self._samples.pop(old)[0], None)
        self._times.append((time.monotonic(), position))

    def close(self) -> None:
        """Give up the ranges that are not being read yet, and wait for the others."""
        for block in self._blocks.values():
            block.asked.cancel()
        self._store.close()

    def _look_ahead(self, last: int) -> None:
        """Ask for the positions up to `last`, and for those of the next seconds if there is room."""
        ahead = AHEAD_SAMPLES * self._ranks
        if len(self._times) > 1:
            (before, begin), (now, end) = self._times[0], self._times[-1]
            ahead = max(ahead, int(AHEAD_S * (end - begin) / max(now - before, 1e-3)))
        ahead = min(ahead, self._size)
        while self._planned <= last or (self._planned <= last + ahead and self._bytes < AHEAD_BYTES):
            positions = np.arange(self._planned, self._planned + self._step)
            for position in positions[self._own(positions)].tolist():
                if position not in self._blocks and position not in self._samples:
                    self._ask(position)
            self._planned += self._step

    def _ask(self, position: int) -> None:
        """Ask for the samples of a block that this rank needs from now on."""
        ids, positions = self._order.block_of(position)
        mine = (positions >= self._start) & self._own(positions)
        ids, positions = ids[mine], positions[mine]
        by_id = np.argsort(ids)
        ids, positions = ids[by_id], positions[by_id]
        shard = int(self._links.index.shard_of(ids[0] + self._offset))
        asked = self._links.ask(self._store, shard, (ids + self._offset - self._first[shard]).tolist())
        block = _Block(asked, ids.tolist(), positions.tolist())
        self._blocks.update(dict.fromkeys(block.positions, block))
        self._bytes += asked.size

    def _open(self, block: _Block) -> None:
        samples = block.asked.samples()
        self._bytes -= block.asked.size
        for i, position, sample in zip(block.ids, block.positions, samples, strict=True):
            del self._blocks[position]
            self._samples[position] = i, sample
            self._by_id[i] = sample
