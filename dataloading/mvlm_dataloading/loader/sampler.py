"""The order of samples: an endless stream that is a pure function of (seed, position), written as index views for DALI.

Epoch after epoch, every sample comes once an epoch. A batch is a slice of the stream, so the order is the same for
every batch size, and a batch may begin in one epoch and end in the next.

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

# So many samples of one shard follow one another: enough for the disk to like it, few enough to mix shards well.
RUN_LENGTH = 16

# So many shards are mixed at a time, as many as a machine can be asked to have at hand when shards come from elsewhere.
GROUP = 32

# Raised when a change of this file deals samples in another order: states of the old order are then refused.
ORDER_VERSION = 1


def epoch_order(seed: int, epoch: int, shard: Int64) -> Int64:
    """int64 (N,), every sample id once. `shard` (N,), ascending, is the shard that each sample lies in.

    Shards are permuted and taken GROUP at a time. Each shard's samples are permuted and cut into runs of RUN_LENGTH,
    and the runs of a group of shards are permuted. With one shard, every order is equally likely.
    """
    keys = hash64(Purpose.ORDER, seed, epoch, np.arange(len(shard)))
    cuts = np.flatnonzero(np.diff(shard, prepend=-1, append=-1))  # where each shard begins, and the end
    ids = np.empty(len(shard), np.int64)
    runs = []
    # Shard by shard, because small sorts are faster than a large one.
    for begin, end in pairwise(cuts):
        ids[begin:end] = begin + np.argsort(keys[begin:end], kind="stable")
        runs.append(np.arange(begin, end, RUN_LENGTH))
    run_begin = np.concatenate(runs)  # (R,) where each run begins in `ids`
    run_length = np.diff(run_begin, append=len(ids))
    first = ids[run_begin]  # a run is known by the sample that it begins with
    by = [first, hash64(Purpose.RUNS, seed, epoch, first)]
    if len(cuts) - 1 > GROUP:
        place = np.empty(int(shard[-1]) + 1, np.int64)  # of each shard in their order
        turns = np.argsort(hash64(Purpose.SHARDS, seed, epoch, np.arange(len(place))), kind="stable")
        place[turns] = np.arange(len(place))
        by.append(place[shard[first]] // GROUP)
    order = np.lexsort(by)  # the last key counts most
    length = run_length[order]
    within = np.arange(len(ids)) - np.repeat(np.cumsum(length) - length, length)
    return ids[np.repeat(run_begin[order], length) + within]


class Stream:
    """Slices of the endless order of one split.

    Args:
        shard: int64 (N,), the shard of each sample.
        shuffle: False gives 0, 1, 2, ... in every epoch.
    """

    def __init__(self, shard: Int64, seed: int, *, shuffle: bool):
        self._shard, self._seed, self._shuffle = shard, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(shard))

    def __call__(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Sample ids and their epochs, int64 (count,) each, from `position` samples after the start of epoch 0 on."""
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


def substitute(seed: int, epoch: int, sample_id: int, size: int, bad: Set[int]) -> int:
    """The sample that stands in for a bad one: the first good one of a sequence drawn from (seed, epoch, sample id).

    It does not depend on the batch nor on when a sample was found to be bad, so a resumed or otherwise batched run
    chooses the same.
    """
    attempt = 0
    while True:
        candidate = int(hash64(Purpose.SUBSTITUTE, seed, epoch, sample_id, attempt) % np.uint64(size))
        if candidate not in bad:
            return candidate
        attempt += 1


def write_index_views(folder: Path, dataset: Dataset, ids: Int64) -> tuple[list[str], list[str]]:
    """Indices that make DALI's reader deliver exactly the samples `ids`, in this order: its tars and its indices.

    The reader obeys index lines in any order, with repetitions, and takes the same tar as often as it is named.
    """
    shard = dataset.shard[ids]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    tars, indices = [], []
    for begin, end in pairwise([0, *cuts.tolist(), len(ids)]):
        path = folder / f"{begin}.idx"
        # A line is copied as it is, so that nothing has to be put together again.
        lines = [dataset.line(i) for i in ids[begin:end].tolist()]
        path.write_bytes(b"v1.2 %d\n%b\n" % (len(lines), b"\n".join(lines)))
        tars.append(str(dataset.tars[shard[begin]]))
        indices.append(str(path))
    return tars, indices
