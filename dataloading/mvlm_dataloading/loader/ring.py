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
"""Number of byte ranges that the ranks of a node together read from a store at a time, if they are at most eight."""
AHEAD_S = 10.0
"""Samples are asked for so many seconds of training in advance, but at most an epoch."""
AHEAD_SAMPLES = 1024
"""Least number of samples that a rank asks for in advance."""
AHEAD_BYTES = 512 << 20
"""A rank asks for nothing more in advance when the blocks that are asked for and not yet used have so many bytes. The
samples of blocks in use are in memory beside them: half of the order's pool on average, 1 GB over all ranks."""
_RATE_BATCHES = 32


def ranges_at_a_time(ranks: int) -> int:
    """Number of byte ranges that one rank reads at a time: its share of `IN_FLIGHT` on its node, but at least 8.

    torchrun states the ranks of a node in LOCAL_WORLD_SIZE. Without it all `ranks` are taken to be on one node.
    """
    return max(8, IN_FLIGHT // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


class _Block(NamedTuple):
    asked: AskedSamples | AskedRows
    ids: list[int]
    positions: list[int]
    """Positions in the sample order of the samples `ids`, which need not be ascending."""


class Ring:
    """Window of samples of linked tars: reads those at one rank's positions of the sample order ahead of time.

    One thread uses it.

    Args:
        links: reader of the samples of `dataset`.
        start: first position.
        step: number of positions of a batch of all ranks.
        own: function that tells which positions are this rank's: int64 (n,) -> bool (n,).
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
        """Samples of the ids at ascending positions, int64 (n,) each.

        An id other than the order's, such as the substitute of a bad sample, is read by itself.

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
        """The sample with id i, from memory if it is there, else read by itself."""
        return self._by_id.get(i) or self._links.one(self._offset + i)

    def release(self, position: int) -> None:
        """Forget the samples at positions before this one. Positions are asked for in ascending order."""
        for old in [one for one in self._samples if one < position]:
            self._by_id.pop(self._samples.pop(old)[0], None)
        self._times.append((time.monotonic(), position))

    def close(self) -> None:
        """Cancel the reads of byte ranges that have not begun, and wait for the others."""
        for block in self._blocks.values():
            block.asked.cancel()
        self._store.close()

    def _look_ahead(self, last: int) -> None:
        """Start to read the samples up to position `last`, and those of the next seconds if memory allows."""
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
        """Start to read the block of the sample at a position: its samples at this rank's positions from `start` on."""
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
