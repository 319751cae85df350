"""Writer of `<split>.index` files, shard by shard. `sample_index` has the format."""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .dali_index import KINDS, DaliIndex
from .sample_index import (
    ABSENT,
    BLOCK,
    HEADER,
    MAGIC,
    RECORD_BYTES,
    SHARD,
    VERSION,
    Field,
    SampleIndex,
    head_crc,
    shards_hash,
)


class Fingerprint:
    """Fingerprint of a split: a hash of its shards and of the places of their samples. Call `add` for each in order.

    It includes places, because views of the same shards may choose other samples or another order. Checkpoints store
    it, so it must not change.
    """

    def __init__(self, split: str, shards: Sequence[Mapping[str, Any]]):
        described = [split, [[one["samples"], one["sha256"]] for one in shards]]
        self._hash = hashlib.sha256(json.dumps(described).encode())

    def add(self, records: NDArray[np.uint32]) -> None:
        """Add the next shard's records, uint32 (n, 9)."""
        places = [records[:, field].astype("<i8") for field in (Field.IMAGE_BLOCK, Field.TEXT_BLOCK)]
        shared = len(np.unique(places[0])) < len(np.unique(places[1]))
        for place in places[: 1 + shared]:  # samples that share an image are told apart by their captions
            self._hash.update((place * BLOCK).tobytes())

    def digits(self) -> str:
        """Its 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]


def fingerprint_of(index: SampleIndex, split: str, shards: Sequence[Mapping[str, Any]]) -> str | None:
    """Fingerprint of the samples that an index lists, made from them, where `index.fingerprint` is only stated.

    Args:
        shards: the split's shards, as `dataset.json` describes them. None is returned if the index has others.

    Raises:
        DataError: records or keys are damaged.
    """
    if np.diff(index.first).tolist() != [one["samples"] for one in shards]:
        return None
    found = Fingerprint(split, shards)
    for shard in range(len(shards)):
        found.add(index.shard_content(shard)[0])
        index.release()
    return found.digits()


class IndexWriter:
    """Writer of one index. Call `add` for each shard in order, then `finish`.

    Args:
        file: empty, open for writing and seeking.
        shards: the split's shards, as `dataset.json` describes them.
    """

    def __init__(self, file: BinaryIO, split: str, shards: Sequence[Mapping[str, Any]]):
        self._file = file
        self._described = shards_hash(split, shards)
        self._table = np.zeros(len(shards), SHARD)
        self._table["samples"] = [shard["samples"] for shard in shards]
        self._shard = 0
        self._records_at = HEADER.size + self._table.nbytes
        self._keys_at = self._records_at + RECORD_BYTES * int(self._table["samples"].sum())
        self._fingerprint = Fingerprint(split, shards)

    def add(self, records: NDArray[np.uint32], keys: bytes) -> None:
        """Append the next shard's records, uint32 (n, 9), and keys."""
        row = self._table[self._shard]
        assert len(records) == row["samples"], f"wanted {row['samples']} records, got {len(records)}"
        content = np.ascontiguousarray(records, "<u4").tobytes()
        row["key_bytes"], row["records_crc"], row["keys_crc"] = len(keys), zlib.crc32(content), zlib.crc32(keys)
        self._file.seek(self._records_at)
        self._file.write(content)
        self._file.seek(self._keys_at)
        self._file.write(keys)
        self._records_at += len(content)
        self._keys_at += len(keys)
        self._fingerprint.add(records)
        self._shard += 1

    def finish(self) -> None:
        """Write the header and the table."""
        assert self._shard == len(self._table), f"wanted {len(self._table)} shards, got {self._shard}"
        fields = (
            MAGIC, VERSION, RECORD_BYTES, int(self._table["samples"].sum()), len(self._table),
            int(self._table["key_bytes"].sum()), self._fingerprint.digits().encode(), self._described,
        )  # fmt: skip
        crc = head_crc(HEADER.pack(*fields, 0, 0), self._table)
        self._file.seek(0)
        self._file.write(HEADER.pack(*fields, crc, 0) + self._table.tobytes())
        self._file.flush()


def pack_records(index: DaliIndex) -> NDArray[np.uint32]:
    """Records of a parsed DALI index, uint32 (n, 9).

    Raises:
        ValueError: an offset is no multiple of 512, which no tar has, or a number does not fit.
    """
    records = np.empty((len(index), len(Field)), "<u4")
    for column, kind in enumerate(KINDS):
        part = index.components[kind]
        absent = part.size < 0
        block, odd = np.divmod(part.offset, BLOCK)
        if (odd[~absent] != 0).any() or (len(block) and max(block.max(), part.size.max()) >= ABSENT):
            raise ValueError(f"the {kind} of a sample at an offset or of a size that no tar has")
        records[:, 2 * column] = np.where(absent, 0, block)
        records[:, 2 * column + 1] = np.where(absent, ABSENT, part.size)
    if len(index.keys) >= ABSENT:
        raise ValueError(f"{len(index.keys)} bytes of keys")
    records[:, Field.KEY_END] = index.key_end
    return records
