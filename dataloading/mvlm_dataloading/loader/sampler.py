"""Sample order, an endless stream that is a pure function of (seed, position); and its index views for DALI.

Every sample comes once per epoch. A batch is a slice of the stream, so the order does not depend on the batch size, and
a batch may begin in one epoch and end in the next.

Shape legend: S shards, n samples of a slice.
"""

import os
import shutil
from collections.abc import Set
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import KINDS
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.randomness import Purpose, hash64

Int64 = NDArray[np.int64]

RUN_LENGTH = 16
"""Consecutive samples from one shard: long enough for sequential reads, short enough to mix shards well."""

GROUP = 32
"""Number of shards that are mixed with each other. It bounds the cache that a remote data set needs."""

# Bytes that views of a segment take, many times over: a page for each of its thousand runs, and 150 for each sample.
_ROOM_FOR_VIEWS = 64 << 20

ORDER_VERSION = 1
"""Increment when a change of this file changes the order. A loader refuses the states of another version."""


class SampleOrder:
    """Endless sample order of one split, read in slices. It is computed by groups of shards, as they are reached.

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

    def _part_of_epoch(self, epoch: int, offset: int, count: int) -> Int64:
        """At least one and at most `count` ids, from the `offset`-th of an epoch on."""
        if not self._shuffle:
            return np.arange(offset, min(offset + count, self._first[-1]))
        _, ends = self._epoch_groups(epoch)
        group = int(np.searchsorted(ends, offset, side="right"))
        order = self._group_order(epoch, group)
        begin = offset - (int(ends[group]) - len(order))
        return order[begin : begin + count]

    def _draw_groups(self, epoch: int) -> tuple[list[Int64], Int64]:
        """Shards of each group, ascending; and the position in the epoch at which each group ends."""
        sizes = np.diff(self._first)
        shards = np.arange(int(np.flatnonzero(sizes)[-1]) + 1)
        if np.count_nonzero(sizes) > GROUP:
            shards = np.argsort(hash64(Purpose.SHARDS, self._seed, epoch, shards), kind="stable")
            groups = [np.sort(shards[begin : begin + GROUP]) for begin in range(0, len(shards), GROUP)]
        else:
            groups = [shards]
        return groups, np.cumsum([sizes[group].sum() for group in groups])

    def _draw_order(self, epoch: int, group: int) -> Int64:
        """A permutation of the ids of a group's samples."""
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
        """Reorder shuffled samples so that those of one image, `images` (n,), come in sets of `per_image`.

        Returns the ids (n,), and the positions in them of the first set of each RUN_LENGTH samples.
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


def check_ranks(batch_size: int, rank: int, world_size: int, train: bool) -> None:
    """ValueError for batches that cannot be dealt to the ranks, or an evaluation on several."""
    if batch_size < 1:
        raise ValueError(f"wanted batch_size of at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"wanted a rank from 0 to world_size - 1, got rank {rank} of {world_size}")
    if batch_size % world_size:
        raise ValueError(f"wanted a global batch_size divisible by world_size, got {batch_size} for {world_size} ranks")
    if world_size > 1 and not train:
        raise ValueError(f"wanted world_size 1 with train=False, got {world_size}; run evaluation on one rank")


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


def check_bad_fraction(dataset: Dataset, bad: Set[int], samples_seen: int, limit: float, ranks: int) -> None:
    """Raise DataError, with the places of 20 images, if more than a share `limit` of the images is undecodable.

    The share is taken of the samples that a rank has seen, or of its share of the split if that is larger. A rank sees
    a random share of the bad images, so with several ranks the limit has a margin of four standard deviations.
    """
    seen = min(len(dataset), max(len(dataset) / ranks, samples_seen))
    allowed = limit * seen + (4 * (limit * seen) ** 0.5 if ranks > 1 else 0)
    if len(bad) > min(allowed, len(dataset) - 1):  # one has to be good, to take the place of the others
        listed = "; ".join(dataset.where(i) for i in sorted(bad)[:20])
        raise DataError(
            f"{dataset.folder}: wanted at most {limit:.0%} undecodable images, "
            f"found {len(bad)} of {seen:.0f}; build the data set again without them: {listed}"
        )


def index_folder() -> str | None:
    """A folder in memory for index views if it has room, else None, for that of temporary files.

    A segment has hundreds of views, which DALI reads once. On a disk each costs up to a millisecond, while the loader
    waits.
    """
    memory = Path("/dev/shm")
    try:
        room = shutil.disk_usage(memory).free if os.access(memory, os.W_OK | os.X_OK) else 0
    except OSError:  # there is no such folder
        room = 0
    return str(memory) if room >= _ROOM_FOR_VIEWS else None


def write_index_views(folder: Path, dataset: Dataset, ids: Int64) -> tuple[list[str], list[str]]:
    """Write indices to `folder` with which DALI's reader delivers the samples `ids` in this order.

    The reader accepts index lines in any order and repeated, and the same tar several times.

    Returns:
        Paths of the tars and of their indices, for the reader's arguments.
    """
    shard = dataset.shard_of(ids)
    # The reader chooses components by extension and decodes by content, so any extension of the right kind will do.
    parts = [
        (KINDS[kind][0], *(values.tolist() for values in dataset.locate(kind, ids)))
        for kind in ("image", "text", "meta", "tokens")
    ]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    tars, indices = [], []
    for begin, end in pairwise([0, *cuts.tolist(), len(ids)]):
        path = folder / f"{begin}.idx"
        lines = [
            " ".join(f"{name} {offset[k]} {size[k]} {k}.{name}" for name, offset, size in parts if size[k] >= 0)
            for k in range(begin, end)
        ]
        path.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
        tars.append(str(dataset.tars[shard[begin]]))
        indices.append(str(path))
    return tars, indices
