"""Sample order 2, of linked data: lanes, which ranks divide among them, so that together they read each byte once.

An epoch's shards are permuted, one after another. This sequence of samples is cut into as many slices as there are
lanes, and each lane reads its own slice. A round of the order has the same number of samples of each lane, lane by
lane. Ranks that take equal parts of a round take whole lanes, if their number divides that of the lanes.

A lane reads blocks of adjacent samples, of a tar each by one request, of a Parquet file a row group. The blocks of
several shards are permuted, and a pool of them is open at a time, whose samples are mixed.

The order is a pure function of seed, lanes and position. Position counts the samples of all epochs, so that a run may
resume anywhere, on any number of ranks.

Shape legend: N samples of the split, S shards, L lanes, P pieces of an epoch, n samples of a group or a request, R row
groups of a shard.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.randomness import Purpose, hash64

LANES = 64
"""Number of lanes of a run, if ranks times microbatches divide it and it divides a round."""
BLOCK_BYTES = 2_000_000
"""Mean bytes of a block of adjacent samples: few enough to mix many in memory, enough for a store's full speed."""
POOL = 1024
"""Number of blocks that all lanes together mix at a time. A split is cut into at least as many, if it has enough
samples."""
PIECES = 1024
"""Least number of pieces into which a split is cut, if it has so many blocks. A piece is a shard, or a part of one."""
GROUP = 512
"""Pieces whose blocks are permuted together, over all lanes: eight of each of 64 lanes."""
CUT = 40
"""Fewest row groups of a lane. The end of a lane cuts one, which two lanes then read: a fortieth more bytes."""


class Lanes(NamedTuple):
    """Parameters of sample order 2, which a loader's state keeps, so that a resumed run goes on with them.

    NOTE: a change of this file that changes the order for equal parameters needs another version of the order. Else a
    resumed run repeats some samples and leaves others out, and nobody notices.
    """

    count: int
    """Number of lanes."""
    rows: int
    """Number of samples of one lane in a round."""
    block: int
    """Most samples of a block of a tar."""


def choose_lanes(dataset: Dataset, parts: int, round_size: int, per_image: int) -> Lanes | None:
    """Choose the lanes of a new run. None for data that are read by whole shards, in order 1: all but linked ones.

    There are `LANES`, or so many more that all parts of a round are whole lanes. If that number does not divide a
    round, it is the largest divisor of both. Data with row groups have fewer, if a lane would have less than `CUT`
    blocks, or if a block of each lane took more memory than `POOL` blocks of tars.

    Args:
        parts: ranks times microbatches.
        round_size: number of samples of a round.
        per_image: number of samples of one image that come one after another. A lane's share of a round is a multiple
            of it.
    """
    if dataset.links is None:
        return None
    whole, rest = divmod(round_size, per_image)
    size = sum(shard["bytes"] for shard in dataset.shards)
    mean = size / max(1, sum(shard["samples"] for shard in dataset.shards))
    block, wanted = max(1, round(BLOCK_BYTES / max(1, mean))), LANES
    if groups := dataset.row_groups():
        blocks = _count_blocks(dataset.shard_sizes, groups, block)
        most = min(LANES, blocks / CUT, POOL * BLOCK_BYTES * blocks / max(1, size))
        wanted = 1 << int(math.log2(max(1, most)))
    count = 1 if rest else math.gcd(math.lcm(wanted, parts), whole)
    return Lanes(count, 1 if count == 1 else round_size // count, block)


def _count_blocks(shard_sizes: Int64, groups: Mapping[int, Int64], block: int) -> int:
    """Number of all blocks: row groups, and of the shards without any, blocks of `block` samples."""
    of_tars = [-(-size // block) for shard, size in enumerate(shard_sizes.tolist()) if shard not in groups]
    return sum(of_tars) + sum(map(len, groups.values()))


class LaneOrder:
    """Sample order 2 of one split. It is computed by groups of pieces, as a lane reaches them.

    Shards are cut into pieces, if there are fewer than `PIECES`, and pieces are permuted. The blocks of a lane's next
    pieces are permuted. Then block number r and each of its samples, with a number u drawn from [0, 1), come at place
    r + pool u: about `pool` blocks of a lane are open at any time. A group of at most so many blocks is permuted as a
    whole.

    Args:
        shard_sizes: int64 (S,), number of samples of each shard. Ids count the samples shard by shard.
        groups: shard -> number of samples of each of its row groups, int64 (R,), which are its blocks. With row groups
            the pool has fewer blocks, so that about as many samples are open as without.
        images: int64 (N,), equal for samples of one image; for `per_image` above 1.
        per_image: samples of an image that come one after another, if they are in one group of pieces.

    Attributes:
        block: samples of a block of the other shards. Blocks count from the first sample of each shard.
    """

    def __init__(
        self,
        shard_sizes: Int64,
        seed: int,
        lanes: Lanes,
        *,
        groups: Mapping[int, Int64] | None = None,
        images: Int64 | None = None,
        per_image: int = 1,
    ):
        self._seed, self._lanes = seed, lanes
        self._images, self._per_image = images, per_image
        self._size = size = int(shard_sizes.sum())
        self.block = max(1, min(lanes.block, size // POOL))
        self._first = np.append(0, np.cumsum(shard_sizes))
        groups = groups or {}
        self._row_groups = {shard: self._first[shard] + np.append(0, np.cumsum(own)) for shard, own in groups.items()}
        piece = self.block * max(1, size // (PIECES * self.block))
        cuts = []
        for shard, (begin, end) in enumerate(zip(self._first, self._first[1:], strict=False)):
            if (own := self._row_groups.get(shard)) is None:
                cuts.append(np.arange(begin, end, piece))
            else:  # from the first row group that begins in each `piece` samples
                cuts.append(own[:-1][np.diff((own[:-1] - begin) // piece, prepend=-1) > 0])
        self._begin = np.concatenate(cuts)  # (P,)
        self._length = np.diff(self._begin, append=size)
        pool = POOL
        if groups:
            pool = min(POOL, POOL * self.block * _count_blocks(shard_sizes, groups, self.block) // max(1, size))
        self._pool = max(1, pool // lanes.count)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._group = lru_cache(maxsize=2 * lanes.count)(self._draw_group)

    def at(self, positions: Int64) -> tuple[Int64, Int64]:
        """Sample ids and their epochs, int64 (n,) each, at the positions int64 (n,) of the endless order."""
        epochs, (count, rows, _) = positions // self._size, self._lanes
        lanes = positions % (count * rows) // rows
        numbers = self._before(lanes, positions) - self._before(lanes, epochs * self._size)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            for lane in np.unique(lanes[epochs == epoch]).tolist():
                here = np.flatnonzero((epochs == epoch) & (lanes == lane))
                _, ends = self._groups(epoch, lane)
                group = np.searchsorted(ends, numbers[here], side="right")
                for k in np.unique(group).tolist():
                    mine = here[group == k]
                    order = self._group(epoch, lane, k)
                    ids[mine] = order[numbers[mine] - (int(ends[k]) - len(order))]
        return ids, epochs

    def block_of(self, position: int) -> tuple[Int64, Int64]:
        """Ids, and positions in the endless order, of all samples in the block of the sample at a position.

        Int64 (n,) each. A block that is cut by the end of a lane has the samples of this lane alone.
        """
        epoch, (count, rows, _) = position // self._size, self._lanes
        lane = np.array(position % (count * rows) // rows)
        first = int(self._before(lane, np.array(epoch * self._size)))
        number = int(self._before(lane, np.array(position))) - first
        _, ends = self._groups(epoch, int(lane))
        group = int(np.searchsorted(ends, number, side="right"))
        order = self._group(epoch, int(lane), group)
        begin = int(ends[group]) - len(order)
        sample = int(order[number - begin])
        low, high = self._block(sample)
        members = np.flatnonzero((order >= low) & (order < high))
        rounds, rest = np.divmod(first + begin + members, rows)
        return order[members], rounds * count * rows + int(lane) * rows + rest

    def _block(self, sample: int) -> tuple[int, int]:
        """First id, and the one behind the last, of the block with a sample."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        if (own := self._row_groups.get(shard)) is not None:
            number = int(np.searchsorted(own, sample, side="right")) - 1
            return int(own[number]), int(own[number + 1])
        first, end = self._first[shard : shard + 2].tolist()
        low = sample - (sample - first) % self.block
        return low, min(low + self.block, end)

    def _blocks(self, begin: int, end: int) -> Int64:
        """First id of each block of the samples `begin` to `end` - 1 of one shard. The first one is `begin`."""
        shard = int(np.searchsorted(self._first, begin, side="right")) - 1
        if (own := self._row_groups.get(shard)) is not None:
            found = own[int(np.searchsorted(own, begin, side="right")) - 1 : int(np.searchsorted(own, end))]
        else:
            found = np.arange(self._block(begin)[0], end, self.block)
        return np.maximum(found, begin)

    def _before(self, lanes: Int64, positions: Int64) -> Int64:
        """Number of samples of each lane that come before a position of the endless order, int64.

        Arguments are broadcast.
        """
        count, rows, _ = self._lanes
        rounds, slots = np.divmod(positions, count * rows)
        return rounds * rows + np.clip(slots - lanes * rows, 0, rows)

    def _draw_epoch(self, epoch: int) -> tuple[Int64, Int64, Int64]:
        """Order of an epoch's pieces, and its division among lanes.

        Returns the first sample id of each piece in their order, int64 (P,); the end of each piece, int64 (P,); and the
        begin of each lane and the end of the last, int64 (L + 1,). Ends and begins count the samples of the epoch.
        """
        order = np.argsort(hash64(Purpose.PIECES, self._seed, epoch, self._begin), kind="stable")
        lanes = np.arange(self._lanes.count)
        bounds = [np.full(len(lanes), number * self._size) for number in (epoch, epoch + 1)]
        sizes = self._before(lanes, bounds[1]) - self._before(lanes, bounds[0])
        return self._begin[order], np.cumsum(self._length[order]), np.append(0, np.cumsum(sizes))

    def _groups(self, epoch: int, lane: int) -> tuple[int, Int64]:
        """Groups of pieces of one lane in an epoch.

        Returns the index of the lane's first piece in the epoch's order, and the end of each group, counted in samples
        of the lane.
        """
        _, ends, lanes = self._epoch(epoch)
        begin, end = lanes[lane : lane + 2].tolist()
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (begin, end - 1))
        step = max(1, GROUP // self._lanes.count)
        return first, np.minimum(ends[np.minimum(np.arange(first + step - 1, last + step, step), last)], end) - begin

    def _draw_group(self, epoch: int, lane: int, number: int) -> Int64:
        """Sample ids of one group of pieces of a lane, in their order: int64 (n,)."""
        begins, ends, lanes = self._epoch(epoch)
        first, _ = self._groups(epoch, lane)
        step = max(1, GROUP // self._lanes.count)
        starts, lengths, spans = [], [], []
        for piece in range(first + step * number, min(first + step * (number + 1), len(ends))):
            before = 0 if piece == 0 else int(ends[piece - 1])
            low, high = max(before, int(lanes[lane])), min(int(ends[piece]), int(lanes[lane + 1]))
            if low >= high:
                break
            begin = int(begins[piece]) + low - before
            end = begin + high - low
            cut = self._blocks(begin, end)
            starts.append(cut)
            lengths.append(np.diff(cut, append=end))
            spans.append(np.arange(begin, end))
        ids, blocks = np.concatenate(spans), np.concatenate(starts)
        rank = np.zeros(len(blocks), np.uint64)
        if len(blocks) > self._pool:
            order = np.lexsort([blocks, hash64(Purpose.BLOCKS, self._seed, epoch, blocks)])
            rank[order] = np.arange(len(blocks))
        draws = hash64(Purpose.MIX, self._seed, epoch, ids) >> np.uint64(32)
        keys = (np.repeat(rank, np.concatenate(lengths)) << np.uint64(32)) + draws * np.uint64(self._pool)
        ids = ids[np.argsort(keys, kind="stable")]
        return ids if self._images is None or self._per_image == 1 else self._together(ids, self._images[ids])

    def _together(self, ids: Int64, images: Int64) -> Int64:
        """Reorder samples so that those of an image come in sets of `per_image`, each at the place of its first sample.

        ids: int64 (n,). images: int64 (n,), equal for samples of one image.
        """
        by_image = np.argsort(images, kind="stable")
        _, first, count = np.unique(images[by_image], return_index=True, return_counts=True)
        within = np.arange(len(ids)) - np.repeat(first, count)
        leaders = by_image[np.arange(len(ids)) - within % self._per_image]
        return ids[by_image[np.lexsort([within, leaders])]]
