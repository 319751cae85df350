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

from .dataset import Dataset
from .randomness import Purpose, hash64
from .shards import index_text

Int64 = NDArray[np.int64]

# So many samples of one shard follow one another: enough for the disk to like it, few enough to mix shards well.
RUN_LENGTH = 16


def epoch_order(seed: int, epoch: int, shard: Int64) -> Int64:
    """int64 (N,), every sample id once. `shard` (N,) is the shard that each sample lies in.

    Each shard's samples are permuted and cut into runs of RUN_LENGTH, and the runs of all shards are permuted. With
    one shard, every order is equally likely.
    """
    ids = np.lexsort((hash64(Purpose.ORDER, seed, epoch, np.arange(len(shard))), shard))  # (N,) grouped by shard
    grouped = shard[ids]
    first = np.searchsorted(grouped, grouped)  # (N,) where the shard of each begins
    place = np.arange(len(ids)) - first
    run_first = ids[first + place // RUN_LENGTH * RUN_LENGTH]  # (N,) a run is known by the sample that it begins with
    return ids[np.lexsort((place, run_first, hash64(Purpose.RUNS, seed, epoch, run_first)))]


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
    lines = _index_lines(dataset, ids)
    cuts = np.flatnonzero(np.diff(dataset.shard[ids])) + 1
    tars, indices = [], []
    for begin, end in pairwise([0, *cuts.tolist(), len(ids)]):
        path = folder / f"{begin}.idx"
        path.write_text(index_text(lines[begin:end]), encoding="utf-8", errors="surrogateescape")
        tars.append(str(dataset.tars[dataset.shard[ids[begin]]]))
        indices.append(str(path))
    return tars, indices


def _index_lines(dataset: Dataset, ids: Int64) -> list[str]:
    """One line a sample, column by column because there are many thousands."""
    keys = dataset.keys[ids].tolist()
    components = []
    for part in (dataset.image, dataset.text, dataset.meta):
        columns = (part.extension[ids].tolist(), part.offset[ids].tolist(), part.size[ids].tolist(), keys)
        components.append([f"{e} {o} {s} {k}.{e} " if s >= 0 else "" for e, o, s, k in zip(*columns, strict=True)])
    return [f"{image}{text}{meta}"[:-1] for image, text, meta in zip(*components, strict=True)]
