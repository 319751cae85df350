"""Samples of a linked file, written to the cache of remote data as DALI reads them, and the index of these.

head      uint32 (n, 6): for each sample the place, in blocks of 512 bytes, and the size of its image, its captions
          and its metadata; the head is filled up to whole blocks
samples   the parts of each sample, each at a multiple of 512 bytes
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import KINDS, Int64
from mvlm_dataloading.dataset.sample_index import ABSENT, BLOCK, SampleIndex
from mvlm_dataloading.untrusted import open_regular

from .samples import LinkReader

_HEAD = 6  # numbers for each sample


def write_shard(reader: LinkReader, shard: int, path: Path) -> None:
    """Write all samples of a shard, which are read in few ranges, to a file. Copies in a view are written once."""
    count = int(reader.index.first[shard + 1] - reader.index.first[shard])
    places = reader.index.records(shard, range(count))[:, :-1]
    new = np.append(True, (places[1:] != places[:-1]).any(axis=1))
    head = np.tile(np.array([0, ABSENT], "<u4"), (count, _HEAD // 2))
    at = -(-head.nbytes // BLOCK)
    with path.open("wb") as file:
        for sample in reader.samples(shard, np.flatnonzero(new).tolist()):
            for column, part in enumerate((sample.image, sample.text, sample.metadata)):
                if part:
                    head[sample.row, 2 * column : 2 * column + 2] = at, len(part)
                    file.seek(at * BLOCK)
                    file.write(part)
                    at += -(-len(part) // BLOCK)
        head = head[np.flatnonzero(new)[np.cumsum(new) - 1]]
        file.truncate(at * BLOCK)
        file.seek(0)
        file.write(head.tobytes())


class LinkedIndex:
    """Index of a linked split in the cache: a `SampleIndex`, but for the places of samples in the cached files.

    Args:
        index: the index of the samples where they were linked.
        files: cached file of each shard. It has to be there when its samples are located.
    """

    def __init__(self, index: SampleIndex, files: Sequence[Path]):
        self.source, self.path, self._files = index, index.path, files
        self.first, self.fingerprint, self.described = index.first, index.fingerprint, index.described
        self._head = lru_cache(maxsize=256)(self._read_head)

    def __len__(self) -> int:
        return len(self.source)

    def shard_of(self, ids: Any) -> Int64:
        """Shard of each sample, int64, of the shape of `ids`."""
        return self.source.shard_of(ids)

    def locate(self, kind: str, ids: Any) -> tuple[Int64, Int64]:
        """Offsets in the cached files, and sizes, as `SampleIndex.locate` returns them."""
        ids = np.asarray(ids)
        found = np.full((*ids.shape, 2), (0, ABSENT), np.int64)
        column, shards = 2 * list(KINDS).index(kind), self.shard_of(ids)
        for shard in np.unique(shards).tolist() if column < _HEAD else ():  # there are no stored tokens
            chosen = shards == shard
            found[chosen] = self._head(shard)[ids[chosen] - self.first[shard], column : column + 2]
        return found[..., 0] * BLOCK, np.where(found[..., 1] == ABSENT, -1, found[..., 1])

    def key(self, i: int) -> str:
        """Key of a sample, or the number of its row in a table."""
        return self.source.key(i)

    def shard_content(self, shard: int) -> tuple[NDArray[np.uint32], bytes]:
        """Records and keys of one shard, of the samples where they were linked."""
        return self.source.shard_content(shard)

    def release(self) -> None:
        """Unmap the pages that were read."""
        self.source.release()

    def _read_head(self, shard: int) -> NDArray[np.uint32]:
        count = int(self.first[shard + 1] - self.first[shard])
        with open_regular(self._files[shard]) as file:
            return np.frombuffer(file.read(4 * _HEAD * count), "<u4").reshape(count, _HEAD)
