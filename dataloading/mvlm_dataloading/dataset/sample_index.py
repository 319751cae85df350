"""Index of a split: location and key of each sample, in one file, `<split>.index`, that all processes map; its writer.

Opening reads the header and the table of shards. Records and keys are read when they are needed, and come from the page
cache that all processes of a machine share. All numbers are little-endian:

    header      112 bytes: HEADER
    table       24 bytes per shard: SHARD
    records     36 bytes per sample, shard by shard: nine uint32, see `Field`; of linked data, see `links.scan`
    keys        of each shard's samples, one after another, without separators

Integrity: the header has a CRC-32 of header and table, which is compared at opening; the table has those of a shard's
records and keys, which are compared when the first of them is read. The header's hash of the shards in `dataset.json`
ties the index to its data set.

Shape legend: N samples, S shards, n samples of a request.
"""

import hashlib
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.untrusted import open_regular

from .dali_index import KINDS, DaliIndex, Int64

VERSION = 1
MAGIC = b"mvlmidx\n"

HEADER = struct.Struct("<8s II QQQ 32s 32s II")
"""Layout of the file's header: magic; version, bytes per record; samples, shards, bytes of all keys; fingerprint
(hexadecimal digits); hash of the described shards (`shards_hash`); CRC-32 of the header, with this field as 0, and the
table; 0."""

SHARD = np.dtype([("samples", "<u8"), ("key_bytes", "<u8"), ("records_crc", "<u4"), ("keys_crc", "<u4")])


class Field(IntEnum):
    """Columns of a record, the nine numbers that locate a sample in its tar.

    Places are counted in blocks of 512 bytes, sizes in bytes. The size of a component that a sample lacks is ABSENT.
    """

    IMAGE_BLOCK = 0
    IMAGE_SIZE = 1
    TEXT_BLOCK = 2
    TEXT_SIZE = 3
    META_BLOCK = 4
    META_SIZE = 5
    TOKENS_BLOCK = 6
    TOKENS_SIZE = 7
    KEY_END = 8
    """End of the key among the keys of the shard, in bytes."""


BLOCK = 512
ABSENT = 0xFFFFFFFF
WIDTHS = range(12, 48, 4)
"""Bytes of a record: 36; of linked data 12, and 8 more for each file of captions."""
_DIGITS = re.compile(r"[0-9a-f]{32}")
KEY_BYTES = 1024
"""Most bytes that the keys of all samples may have on average."""


def most_bytes(samples: int, shards: int) -> int:
    """Bytes that the index of a split may have."""
    return HEADER.size + SHARD.itemsize * shards + (WIDTHS[-1] + KEY_BYTES) * samples


def index_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.index"


def shards_hash(split: str, shards: Sequence[Mapping[str, Any]]) -> bytes:
    """Hash (32 bytes) of a split's shards as `dataset.json` describes them."""
    names = ("tar", "samples", "bytes", "sha256", "index_sha256")
    named = [
        [*map(one.get, names), *(one[name] for name in ("etag", "captions", "groups") if name in one)] for one in shards
    ]
    return hashlib.sha256(json.dumps([split, named]).encode()).digest()


class SampleIndex:
    """An open index of a split.

    Args:
        content: the bytes of an index file.
        path: the file, for messages. None for an index in memory, whose bytes are trusted.
        hint: how to get a good index, for messages.
        fetch: fetches bytes `begin` to `end` - 1 of the file, of which the head alone may be there. Called for the
            records and the keys of a shard, when they are first read and are not there.

    Attributes:
        first: int64 (S + 1,): id of the first sample of each shard, and N.
        fingerprint: hash of the split's samples and their order.
        columns: how many uint32 numbers a record has.
        described: hash of the shards as dataset.json describes them, see `shards_hash`.

    Raises:
        DataError: the content is no index, is damaged or truncated, or has another version. From all methods: the
            checksum of what they read is wrong.
    """

    def __init__(
        self,
        content: "mmap.mmap | bytes | memoryview",
        path: Path | None = None,
        hint: str = "",
        fetch: Callable[[int, int], None] | None = None,
    ):
        self.path, self._hint, self._content, self._fetch = path, hint, content, fetch
        if len(content) < HEADER.size:
            raise self._refusal(f"at least {HEADER.size} bytes", f"{len(content)}")
        header = HEADER.unpack_from(content)
        magic, version, width, samples, shards, key_bytes, fingerprint, self.described, crc, _ = header
        if magic != MAGIC:
            raise self._refusal(f"an index that begins with {MAGIC!r}", repr(magic))
        if version != VERSION or width not in WIDTHS:
            raise self._refusal(f"an index of version {VERSION}", f"version {version}, records of {width} bytes")
        self.columns: int = width // 4
        records_at = HEADER.size + SHARD.itemsize * shards
        keys_at = records_at + width * samples
        if len(content) != keys_at + key_bytes:
            raise self._refusal(f"{keys_at + key_bytes} bytes as its header says", f"{len(content)}")
        table = np.frombuffer(content, SHARD, shards, HEADER.size)
        if head_crc(content[: HEADER.size], table) != crc:
            raise self._refusal("a header and a table with the stored checksum", "other bytes")
        self.fingerprint: str = fingerprint.decode(errors="replace")
        if not _DIGITS.fullmatch(self.fingerprint):
            raise self._refusal("a fingerprint of 32 hexadecimal digits", "another one")
        for name, count in (("samples", samples), ("key_bytes", key_bytes)):
            if sum(table[name].tolist()) != count:
                raise self._refusal(f"a table of {count} {name} as its header says", "another one")
        self.first: Int64 = np.append(0, np.cumsum(table["samples"])).astype(np.int64)
        self._key_first = np.append(0, np.cumsum(table["key_bytes"])).astype(np.int64)
        self._records = np.frombuffer(content, "<u4", self.columns * samples, records_at).reshape(samples, self.columns)
        self._keys = np.frombuffer(content, np.uint8, key_bytes, keys_at)
        self._places = (records_at + width * self.first).tolist(), (keys_at + self._key_first).tolist()
        """Byte offsets in the file, by shard, of the shard's records and of its keys."""
        self._crc = np.stack([table["records_crc"], table["keys_crc"]])  # (2, S)
        self._checked = np.full(self._crc.shape, path is None)

    def __len__(self) -> int:
        return len(self._records)

    def __reduce__(self):
        if self.path is None:
            return SampleIndex, (bytes(self._content),)
        return map_index, (self.path, self._hint)

    def shard_of(self, ids: Any) -> Int64:
        """Shard of each sample, int64, of the shape of `ids`."""
        return np.searchsorted(self.first[1:], ids, side="right")

    def locate(self, kind: str, ids: Any) -> tuple[Int64, Int64]:
        """Offsets and sizes in bytes of a component, int64, of the shape of `ids`. The size is -1 if there is none."""
        for shard in np.unique(self.shard_of(ids)).tolist():
            self._check(0, shard)
        column = 2 * list(KINDS).index(kind)
        found = self._records[np.asarray(ids), column : column + 2].astype(np.int64)
        return found[..., 0] * BLOCK, np.where(found[..., 1] == ABSENT, -1, found[..., 1])

    def records(self, shard: int, rows: Any) -> NDArray[np.uint32]:
        """Records of the samples `rows` of a shard, uint32 (n, columns).

        Rows are counted from the shard's first sample.
        """
        self._check(0, shard)
        return self._records[self.first[shard] + np.asarray(rows)]

    def key(self, i: int) -> str:
        """Key of a sample: the name of its files without the extension."""
        shard = int(self.shard_of(i))
        self._check(0, shard)
        self._check(1, shard)
        begin = int(self._records[i - 1, -1]) if i > self.first[shard] else 0
        place = self._key_first[shard]
        key = self._keys[place + begin : place + int(self._records[i, -1])]
        return key.tobytes().decode(errors="surrogateescape")

    def check_all(self) -> None:
        """Compare the checksum of every shard's records. DataError if one differs."""
        for shard in range(len(self.first) - 1):
            self.shard_content(shard)
            self.release()

    def release(self) -> None:
        """Unmap the pages that were read. They stay in the page cache."""
        if isinstance(self._content, mmap.mmap):
            self._content.madvise(mmap.MADV_DONTNEED)

    def shard_content(self, shard: int) -> tuple[NDArray[np.uint32], bytes]:
        """Records, uint32 (n, columns), and keys of one shard, as `IndexWriter.add` takes them."""
        self._check(0, shard)
        self._check(1, shard)
        records, keys = self._parts(shard)
        return records, keys.tobytes()

    def _parts(self, shard: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        begin, end = self.first[shard : shard + 2]
        key_begin, key_end = self._key_first[shard : shard + 2]
        return self._records[begin:end], self._keys[key_begin:key_end]

    def _check(self, part: int, shard: int) -> None:
        if not self._checked[part, shard]:
            if self._fetch is not None and not self._is_good(part, shard):
                begin, size = self._places[part][shard], self._parts(shard)[part].nbytes
                self._fetch(begin, begin + size)
            if not self._is_good(part, shard):
                what = ("records", "keys")[part]
                raise self._refusal(f"the stored checksum of the {what} of shard {shard}", "other bytes")
            self._checked[part, shard] = True

    def _is_good(self, part: int, shard: int) -> bool:
        return zlib.crc32(self._parts(shard)[part].data) == self._crc[part, shard]

    def _refusal(self, wanted: str, found: str) -> DataError:
        return DataError(f"{self.path or 'index in memory'}: wanted {wanted}, found {found}; {self._hint}")


def head_crc(header: bytes | memoryview, table: NDArray) -> int:
    """CRC-32 of a header, with its own CRC taken as 0, and a table of shards."""
    return zlib.crc32(table.tobytes(), zlib.crc32(bytes(header[:-8]) + bytes(8)))


def bytes_of_head(header: bytes, most: int) -> tuple[int, int]:
    """Read from an index's header the size of header and table together, and that of the whole index, in bytes.

    ValueError if it is no header of an index, or if the index states more than `most` bytes.
    """
    if len(header) < HEADER.size:
        raise ValueError(f"{len(header)} bytes")
    magic, _, width, samples, shards, key_bytes, *_ = HEADER.unpack_from(header)
    head = HEADER.size + SHARD.itemsize * shards
    total = head + width * samples + key_bytes
    if magic != MAGIC or total > most:
        raise ValueError("another file" if magic != MAGIC else f"{total} bytes")
    return head, total


def map_index(path: Path, hint: str = "", fetch: Callable[[int, int], None] | None = None) -> SampleIndex:
    """Map an index file. Arguments and DataError as of `SampleIndex`."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            return SampleIndex(b"", path, hint)  # raises; an empty file cannot be mapped
        return SampleIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path, hint, fetch)


class Fingerprint:
    """Fingerprint of a split: a hash of its shards and of the places of their samples. Call `add` for each in order.

    It includes places, because views of the same shards may choose other samples or another order. Checkpoints store
    it, so it must not change.

    Args:
        shards: the split's shards, as `dataset.json` describes them.
        captions: the field of this name in `dataset.json`, which linked data alone have.
    """

    def __init__(self, split: str, shards: Sequence[Mapping[str, Any]], captions: Any = None):
        described = [split, [[one["samples"], one["sha256"] or one.get("etag", "")] for one in shards]]
        described += [] if captions is None else [captions, [one.get("captions", 0) for one in shards]]
        self._hash = hashlib.sha256(json.dumps(described).encode())

    def add(self, records: NDArray[np.uint32]) -> None:
        """Add the next shard's records, uint32 (n, columns)."""
        places = [records[:, field].astype("<i8") for field in (Field.IMAGE_BLOCK, Field.TEXT_BLOCK)]
        shared = len(np.unique(places[0])) < len(np.unique(places[1]))
        for place in places[: 1 + shared]:  # samples that share an image are told apart by their captions
            self._hash.update((place * BLOCK).tobytes())

    def digits(self) -> str:
        """Fingerprint of the samples added so far: 32 hexadecimal digits."""
        return self._hash.hexdigest()[:32]


def fingerprint_of(index: Any, split: str, shards: Sequence[Mapping[str, Any]], captions: Any = None) -> str | None:
    """Fingerprint of the samples that an index lists, made from them, where `index.fingerprint` is only stated.

    Args:
        index: a `SampleIndex`, or the `LinkedIndex` of linked data.
        shards: the split's shards, as `dataset.json` describes them. None is returned if the index has others.
        captions: as for `Fingerprint`.
    """
    if np.diff(index.first).tolist() != [one["samples"] for one in shards]:
        return None
    found = Fingerprint(split, shards, captions)
    for shard in range(len(shards)):
        found.add(index.shard_content(shard)[0])
        index.release()
    return found.digits()


class IndexWriter:
    """Writer of the index of one split. Call `add` for each shard in order, then `finish`.

    Args:
        file: empty, open for writing and seeking.
        shards: the split's shards, as `dataset.json` describes them.
        columns: how many uint32 numbers a record has.
        captions: as for `Fingerprint`.
    """

    def __init__(
        self,
        file: BinaryIO,
        split: str,
        shards: Sequence[Mapping[str, Any]],
        *,
        columns: int = len(Field),
        captions: Any = None,
    ):
        self._file, self._width = file, 4 * columns
        self._described = shards_hash(split, shards)
        self._table = np.zeros(len(shards), SHARD)
        self._table["samples"] = [shard["samples"] for shard in shards]
        self._shard = 0
        self._records_at = HEADER.size + self._table.nbytes
        self._keys_at = self._records_at + self._width * int(self._table["samples"].sum())
        self._fingerprint = Fingerprint(split, shards, captions)

    def add(self, records: NDArray[np.uint32], keys: bytes) -> None:
        """Append the next shard's records, uint32 (n, columns), and keys."""
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
            MAGIC, VERSION, self._width, int(self._table["samples"].sum()), len(self._table),
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
