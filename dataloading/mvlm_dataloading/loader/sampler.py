"""Sample order 1, and the stored order: endless streams that are pure functions of (seed, position).

Every sample comes once per epoch. A batch is a slice of the stream, so the order does not depend on the batch size, and
a batch may begin in one epoch and end in the next. Training on linked data has order 2
(`mvlm_dataloading.loader.lanes`).

Shape legend: S shards, n samples of a slice.
"""

from collections.abc import Set
from functools import lru_cache

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.randomness import Purpose, hash64

RUN_LENGTH = 16
"""Consecutive samples from one shard: long enough for sequential reads, short enough to mix shards well."""

GROUP = 32
"""Number of shards whose samples are mixed with each other. It bounds the cache that a remote data set needs."""


class SampleOrder:
    """Endless sample order of one split, read in slices. It is computed by groups of shards, as they are reached.

    NOTE: this is order 1. If it changed, resumed runs would repeat some samples and leave others out, and nobody would
    notice: a changed order needs another number.

    Shards are permuted and divided into groups of GROUP. Each shard's samples are permuted and divided into runs of
    RUN_LENGTH, and the runs of a group are permuted. With one shard, all orders are equally likely.

    With `per_image` above 1, an image's samples are divided into sets of that many, which stay together.

    Args:
        shard_sizes: int64 (S,), number of samples of each shard. Ids count the samples shard by shard.
        shuffle: False yields 0, 1, 2, ... in every epoch.
        images: int64 (N,), equal for samples of one image; for `per_image` above 1.
        per_image: samples of an image that come one after another. Its last ones may be fewer.
    """

    def __init__(
        self, shard_sizes: Int64, seed: int, *, shuffle: bool, images: Int64 | None = None, per_image: int = 1
    ):
        self._seed, self._shuffle = seed, shuffle
        self._images, self._per_image = images, per_image
        self._first = np.append(0, np.cumsum(shard_sizes))
        self._epoch_groups = lru_cache(maxsize=2)(self._draw_groups)
        self._group_order = lru_cache(maxsize=2)(self._draw_order)

    def __call__(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Sample ids and their epochs, int64 (count,) each, starting `position` samples after the start of epoch 0."""
        size = int(self._first[-1])
        ids, epochs = [], []
        while count > 0:
            epoch, offset = divmod(position, size)
            taken = self._part_of_epoch(epoch, offset, count)
            ids.append(taken)
            epochs.append(np.full(len(taken), epoch))
            position, count = position + len(taken), count - len(taken)
        return np.concatenate(ids), np.concatenate(epochs)

    def at(self, positions: Int64) -> tuple[Int64, Int64]:
        """Sample ids and their epochs, int64 (n,) each, at ascending positions int64 (n,) of the endless order."""
        begin = int(positions[0])
        ids, epochs = self(begin, int(positions[-1]) - begin + 1)
        return ids[positions - begin], epochs[positions - begin]

    def _part_of_epoch(self, epoch: int, offset: int, count: int) -> Int64:
        """Sample ids from place `offset` of an epoch on: at least one and at most `count`, int64."""
        if not self._shuffle:
            return np.arange(offset, min(offset + count, self._first[-1]))
        _, ends = self._epoch_groups(epoch)
        group = int(np.searchsorted(ends, offset, side="right"))
        order = self._group_order(epoch, group)
        begin = offset - (int(ends[group]) - len(order))
        return order[begin : begin + count]

    def _draw_groups(self, epoch: int) -> tuple[list[Int64], Int64]:
        """Division of an epoch's shards into groups: shard numbers of each group, ascending, and where each group ends.

        Ends count the samples of the epoch.
        """
        sizes = np.diff(self._first)
        shards = np.arange(int(np.flatnonzero(sizes)[-1]) + 1)
        if np.count_nonzero(sizes) > GROUP:
            shards = np.argsort(hash64(Purpose.SHARDS, self._seed, epoch, shards), kind="stable")
            groups = [np.sort(shards[begin : begin + GROUP]) for begin in range(0, len(shards), GROUP)]
        else:
            groups = [shards]
        return groups, np.cumsum([sizes[group].sum() for group in groups])

    def _draw_order(self, epoch: int, group: int) -> Int64:
        """Sample ids of one group of shards in their random order."""
        spans = [self._first[shard : shard + 2].tolist() for shard in self._epoch_groups(epoch)[0][group]]
        # One sort per shard: many small sorts are faster than one large sort.
        shuffled = [
            begin + np.argsort(hash64(Purpose.ORDER, self._seed, epoch, np.arange(begin, end)), kind="stable")
            for begin, end in spans
        ]
        begins = [np.arange(0, len(one), RUN_LENGTH) for one in shuffled]
        if self._per_image > 1 and self._images is not None:
            both = [self._together(epoch, one, self._images[one]) for one in shuffled]
            shuffled, begins = [one for one, _ in both], [one for _, one in both]
        ids = np.concatenate(shuffled)
        starts = np.cumsum([0, *map(len, shuffled)])
        run_begin = np.concatenate([start + one for start, one in zip(starts, begins, strict=False)])
        run_length = np.diff(run_begin, append=len(ids))
        first = ids[run_begin]  # a run is identified by its first sample
        order = np.lexsort([first, hash64(Purpose.RUNS, self._seed, epoch, first)])  # the last key is the primary one
        length = run_length[order]
        within = np.arange(len(ids)) - np.repeat(np.cumsum(length) - length, length)
        return ids[np.repeat(run_begin[order], length) + within]

    def _together(self, epoch: int, ids: Int64, images: Int64) -> tuple[Int64, Int64]:
        """Reorder shuffled samples so that those of one image come in sets of `per_image`.

        ids: int64 (n,). images: int64 (n,), equal for samples of one image. Returns the ids, and the indices in them at
        which runs begin: whole sets, about RUN_LENGTH samples.
        """
        by_image = np.argsort(images, kind="stable")
        of_image = images[by_image]
        _, first, count = np.unique(of_image, return_index=True, return_counts=True)
        within = np.arange(len(ids)) - np.repeat(first, count)  # number of each sample among its image's
        begin = np.flatnonzero(within % self._per_image == 0)  # of each set
        length = np.diff(begin, append=len(ids))
        leader = ids[by_image][begin]  # a set is identified by its first sample
        order = np.lexsort([leader, hash64(Purpose.TOGETHER, self._seed, epoch, leader)])
        length, begin = length[order], begin[order]
        starts = np.cumsum(length) - length
        rows = np.repeat(begin - starts, length) + np.arange(len(ids))
        _, firsts = np.unique(starts // RUN_LENGTH, return_index=True)
        return ids[by_image][rows], starts[firsts]


def substitute_sample(seed: int, epoch: int, sample_id: int, size: int, bad: Set[int]) -> int:
    """Substitute of a bad sample: the first good one in a sequence drawn from (seed, epoch, sample id).

    It does not depend on the batch size, nor on when the sample was found to be bad. A resumed run therefore chooses
    the same substitute.

    Args:
        size: samples of the split.
        bad: ids that must not be chosen.
    """
    attempt = 0
    while True:
        candidate = int(hash64(Purpose.SUBSTITUTE, seed, epoch, sample_id, attempt) % np.uint64(size))
        if candidate not in bad:
            return candidate
        attempt += 1
