"""Sample order, an endless stream that is a pure function of (seed, position); and its index views for DALI.

Every sample comes once per epoch. A batch is a slice of the stream, so the order does not depend on the batch size, and
a batch may begin in one epoch and end in the next.

Shape legend: N samples of the split, n samples of a slice.
"""

from collections.abc import Set
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.randomness import Purpose, hash64

Int64 = NDArray[np.int64]

RUN_LENGTH = 16
"""Consecutive samples from one shard: long enough for sequential reads, short enough to mix shards well."""

GROUP = 32
"""Number of shards that are mixed with each other. It bounds the cache that a remote data set needs."""

ORDER_VERSION = 1
"""Increment when a change of this file changes the order. A loader refuses the states of another version."""


def epoch_order(seed: int, epoch: int, shard: Int64) -> Int64:
    """A permutation of all sample ids, int64 (N,).

    Shards are permuted and divided into groups of GROUP. Each shard's samples are permuted and divided into runs of
    RUN_LENGTH, and the runs of a group are permuted. With one shard, all orders are equally likely.

    Args:
        shard: int64 (N,), ascending: the shard of each sample.
    """
    keys = hash64(Purpose.ORDER, seed, epoch, np.arange(len(shard)))
    cuts = np.flatnonzero(np.diff(shard, prepend=-1, append=-1))  # the first id of each shard, and N
    ids = np.empty(len(shard), np.int64)
    runs = []
    # One sort per shard: many small sorts are faster than one large sort.
    for begin, end in pairwise(cuts):
        ids[begin:end] = begin + np.argsort(keys[begin:end], kind="stable")
        runs.append(np.arange(begin, end, RUN_LENGTH))
    run_begin = np.concatenate(runs)  # (R,) start of each run in `ids`
    run_length = np.diff(run_begin, append=len(ids))
    first = ids[run_begin]  # a run is identified by its first sample
    sort_keys = [first, hash64(Purpose.RUNS, seed, epoch, first)]
    if len(cuts) - 1 > GROUP:
        rank = np.empty(int(shard[-1]) + 1, np.int64)  # position of each shard in the permuted shards
        permuted = np.argsort(hash64(Purpose.SHARDS, seed, epoch, np.arange(len(rank))), kind="stable")
        rank[permuted] = np.arange(len(rank))
        sort_keys.append(rank[shard[first]] // GROUP)
    order = np.lexsort(sort_keys)  # the last key is the primary one
    length = run_length[order]
    within = np.arange(len(ids)) - np.repeat(np.cumsum(length) - length, length)
    return ids[np.repeat(run_begin[order], length) + within]


class SampleOrder:
    """Endless sample order of one split, read in slices.

    Args:
        shard: int64 (N,), the shard of each sample.
        shuffle: False yields 0, 1, 2, ... in every epoch.
    """

    def __init__(self, shard: Int64, seed: int, *, shuffle: bool):
        self._shard, self._seed, self._shuffle = shard, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(shard))

    def __call__(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Sample ids and their epochs, int64 (count,) each, starting `position` samples after the start of epoch 0."""
        size = len(self._shard)
        ids, epochs = [], []
        while count > 0:
            epoch, offset = divmod(position, size)
            taken = self._epoch_order(epoch)[offset : offset + count]
            ids.append(taken)
            epochs.append(np.full(len(taken), epoch))
            position, count = position + len(taken), count - len(taken)
        return np.concatenate(ids), np.concatenate(epochs)

    def _epoch_order(self, epoch: int) -> Int64:
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._seed, epoch, self._shard)
        return self._order


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


def write_index_views(folder: Path, dataset: Dataset, ids: Int64) -> tuple[list[str], list[str]]:
    """Write indices to `folder` with which DALI's reader delivers the samples `ids` in this order.

    The reader accepts index lines in any order and repeated, and the same tar several times.

    Returns:
        Paths of the tars and of their indices, for the reader's arguments.
    """
    shard = dataset.shard[ids]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    tars, indices = [], []
    for begin, end in pairwise([0, *cuts.tolist(), len(ids)]):
        path = folder / f"{begin}.idx"
        lines = [dataset.index_line(i) for i in ids[begin:end].tolist()]
        path.write_bytes(b"v1.2 %d\n%b\n" % (len(lines), b"\n".join(lines)))
        tars.append(str(dataset.tars[shard[begin]]))
        indices.append(str(path))
    return tars, indices
