"""Samples of a linked split, read from the places that its index has: image, captions and their probabilities."""

import io
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.sample_index import ABSENT, BLOCK, SampleIndex
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.images.decode import decode
from mvlm_dataloading.images.limits import ImageRefusedError, limits_of_build

from .captions import CaptionSpec, read_spec
from .scan import MAX_IMAGE, MAX_PIXELS, ScanOptions
from .store import LinkedFile, RangeStore
from .tables import Rows, Table, open_table, read_group, read_groups

WEIGHTS = "caption_weights"
"""Name in the metadata of a linked sample: the probability of each caption, if they differ."""
_GAP = 64 << 10
"""Bytes between two files that are read with them rather than by two ranges."""
_RANGE = 8 << 20
_BLOCK_BYTES = 32 << 20
"""Bytes of images that are read together; the next ones are read meanwhile."""
_AHEAD = 64
"""Most samples that are read together for one that is asked for after its neighbour."""
_TABLES = 512
"""Footers of Parquet files that are kept: those of the pieces that `loader.lanes` mixes."""
_KNOWN = (b"\xff\xd8", b"\x89PNG", b"RIFF")


class LinkedSample(NamedTuple):
    """A sample of a linked file."""

    row: int
    """Number of the sample among those of its shard."""
    image: bytes
    """Encoded image, a JPEG, PNG or WebP. Those of other formats become a PNG."""
    text: bytes
    """Captions, one per line."""
    metadata: bytes
    """JSON object with `WEIGHTS`, or nothing."""


class LinkReader:
    """Reads samples of a split. Several threads may use it.

    Args:
        shards: the split's shards, as `dataset.json` describes them.
        options: captions and images of the link, or of each link that a view has. A shard has the number of its own.
        in_flight: ranges that are read at a time.
    """

    def __init__(
        self,
        shards: Sequence[Mapping[str, Any]],
        index: SampleIndex,
        options: Sequence[ScanOptions],
        in_flight: int = 32,
    ):
        self.files = [LinkedFile(one["tar"], one["bytes"], one["etag"]) for one in shards]
        self.index, self.options = index, [options[one.get("captions", 0)] for one in shards]
        self.store = RangeStore(in_flight)
        self._tables, self._tables_lock = OrderedDict[int, Future[Table]](), threading.Lock()
        self._near: dict[tuple[int, int], LinkedSample] = {}  # those that `one` has read last
        self._group = lru_cache(maxsize=1)(  # for `one`
            lambda shard, group, images: read_group(self.store, self._table(self.store, shard), group, images=images)
        )

    def one(self, i: int) -> LinkedSample:
        """Sample i of the index. If the one before it was the last of those that are remembered, many are read."""
        shard = int(self.index.shard_of(i))
        first, end = self.index.first[shard : shard + 2].tolist()
        near, row = self._near, i - first
        if (shard, row) not in near:
            count = min(_AHEAD, 2 * len(near)) if (shard, row - 1) in near else 1
            rows = range(row, min(row + count, end - first))
            self._near = near = {(shard, sample.row): sample for sample in self.samples(shard, rows)}
        return near[shard, row]

    def where(self, i: int) -> str:
        """Place of sample i of the index, for messages."""
        shard = int(self.index.shard_of(i))
        url, record = self.files[shard].url, self.index.records(shard, [i - int(self.index.first[shard])])[0]
        return (
            f"{url} row {record[0]}" if is_table(url) else f"{url} offset {record[0] * BLOCK} key {self.index.key(i)}"
        )

    def faults(self) -> dict[int, str]:
        """Why shards cannot be read as they were linked, by number. Every file is asked for its first byte."""
        asked, found = [self.store.submit(file, 0, min(1, file.size)) for file in self.files], dict[int, str]()
        for shard, future in enumerate(asked):
            try:
                future.result()
            except DataError as error:
                found[shard] = str(error)
        return found

    def samples(self, shard: int, rows: Sequence[int], *, images: bool = True) -> Iterator[LinkedSample]:
        """Samples of a shard, with ranges that neighbours share.

        Args:
            rows: ascending numbers of samples among those of the shard.
            images: the images are wanted too. Without, they are empty.

        Raises:
            DataError: the file has changed since it was linked, or cannot be read.
        """
        records = self.index.records(shard, rows)
        read = self._rows_of_table if is_table(self.files[shard].url) else self._files_of_tar
        for row, (image, parts) in zip(rows, read(shard, records, images), strict=True):
            yield _sample(int(row), image, parts, self.options[shard].captions)

    def ask(self, store: RangeStore, shard: int, rows: Sequence[int]) -> "AskedSamples | AskedRows":
        """Samples whose ranges are read from now on. `rows` as of `samples`, of a table those of one row group."""
        linked, records, options = self.files[shard], self.index.records(shard, rows), self.options[shard]
        if not is_table(linked.url):
            return AskedSamples(store, linked, records, rows, options)
        first = int(records[0, 0])

        def read() -> tuple[int, Rows]:
            table = self._table(store, shard)
            group = table.group_of(first)
            return table.first[group], read_group(store, table, group)

        return AskedRows(store.call(read), linked, records, rows, options)

    def _table(self, store: RangeStore, shard: int) -> Table:
        """The footer of a table. Of several threads that want it at a time, one reads it."""
        with self._tables_lock:
            found = self._tables.get(shard)
            if mine := found is None:
                found = self._tables[shard] = Future()
                if len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
        if mine:
            options = self.options[shard]
            try:
                found.set_result(open_table(store, self.files[shard], options.captions, options.image))
            except BaseException as error:
                with self._tables_lock:
                    self._tables.pop(shard, None)
                found.set_exception(error)
        return found.result()

    def _rows_of_table(
        self, shard: int, records: NDArray[np.uint32], images: bool
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        table, group, rows = self._table(self.store, shard), -1, Rows()
        numbers = [table.group_of(row) for row in records[:, 0].tolist()]
        groups = list(dict.fromkeys(numbers))
        if len(groups) == 1:
            read = iter([self._group(shard, groups[0], images)])
        else:
            read = read_groups(self.store, table, groups, images=images)
        for row, number in zip(records[:, 0].tolist(), numbers, strict=True):
            if number != group:
                group, rows = number, next(read)
            yield rows[row - table.first[group]]

    def _files_of_tar(
        self, shard: int, records: NDArray[np.uint32], images: bool
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        names = self.options[shard].captions.files
        if not images:
            records[:, 1] = ABSENT
        blocks, waiting = _blocks(records), deque[tuple[NDArray[np.uint32], _Ranges]]()
        while waiting or blocks:
            while blocks and len(waiting) < 2:
                block = blocks.popleft()
                waiting.append((block, _Ranges(self.store, self.files[shard], block)))
            block, ranges = waiting.popleft()
            yield from (ranges.parts(record, names) for record in block.tolist())


class AskedSamples:
    """Samples of a tar, whose ranges are being read.

    Attributes:
        size: bytes of their images and captions.
    """

    def __init__(
        self,
        store: RangeStore,
        linked: LinkedFile,
        records: NDArray[np.uint32],
        rows: Sequence[int],
        options: ScanOptions,
    ):
        sizes = records[:, 1:-1:2]
        self.size = int(sizes[sizes != ABSENT].sum(dtype=np.int64))
        self._records, self._rows, self._captions = records, rows, options.captions
        self._ranges = _Ranges(store, linked, records)

    def samples(self) -> list[LinkedSample]:
        """The samples, once their ranges are there. Raises DataError as `LinkReader.samples`."""
        spec = self._captions
        found = (self._ranges.parts(record, spec.files) for record in self._records.tolist())
        return [_sample(int(row), *parts, spec) for row, parts in zip(self._rows, found, strict=True)]

    def cancel(self) -> None:
        """Give up the ranges that are not being read yet."""
        self._ranges.cancel()


class AskedRows:
    """Samples of one row group of a Parquet file, which is being read.

    Args:
        group: number of the row group's first row, and its rows.

    Attributes:
        size: bytes of their images.
    """

    def __init__(
        self,
        group: "Future[tuple[int, Rows]]",
        linked: LinkedFile,
        records: NDArray[np.uint32],
        rows: Sequence[int],
        options: ScanOptions,
    ):
        self.size = int(records[:, 1].sum(dtype=np.int64))
        self._group, self._linked, self._captions = group, linked, options.captions
        self._numbers, self._rows = records[:, 0].tolist(), rows

    def samples(self) -> list[LinkedSample]:
        """The samples, once the row group is there. Raises DataError as `LinkReader.samples`."""
        first, found = self._group.result()
        if not first <= min(self._numbers) <= max(self._numbers) < first + len(found):
            raise DataError(f"{self._linked.url}: wanted the row groups that were linked, found others; link again")
        wanted = [found[number - first] for number in self._numbers]
        pairs = zip(self._rows, wanted, strict=True)
        return [_sample(int(row), image, values, self._captions) for row, (image, values) in pairs]

    def cancel(self) -> None:
        """Give up the row group if it is not being read yet."""
        self._group.cancel()


def is_table(url: str) -> bool:
    """True for a Parquet file, by its name."""
    return url.endswith(".parquet")


def _blocks(records: NDArray[np.uint32]) -> deque[NDArray[np.uint32]]:
    """Consecutive records in blocks of about `_BLOCK_BYTES`."""
    if not len(records):
        return deque()
    sizes = np.where(records[:, 1] == ABSENT, _GAP, records[:, 1]).astype(np.int64)
    number = np.cumsum(sizes) // _BLOCK_BYTES
    return deque(np.split(records, np.flatnonzero(np.diff(number)) + 1))


class _Ranges:
    """Ranges of a tar that cover the files of some samples, in flight from the start."""

    def __init__(self, store: RangeStore, linked: LinkedFile, records: NDArray[np.uint32]):
        self._begins: list[int] = []
        self._futures: list[Future[memoryview]] = []
        pairs = records[:, :-1].reshape(-1, 2).astype(np.int64)
        pairs = pairs[pairs[:, 1] != ABSENT]
        begin = end = -1
        for block, size in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
            place = block * BLOCK
            if begin < 0 or (place >= end and (place > end + _GAP or place + size > begin + _RANGE)):
                self._submit(store, linked, begin, end)
                begin, end = place, place + size
            end = max(end, place + size)
        self._submit(store, linked, begin, end)

    def _submit(self, store: RangeStore, linked: LinkedFile, begin: int, end: int) -> None:
        if begin >= 0:
            self._begins.append(begin)
            self._futures.append(store.submit(linked, begin, end))

    def parts(self, record: Sequence[int], names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """The image of a sample, empty if it was not asked for, and its files of these names."""
        places = zip(("", *names), record[0:-1:2], record[1:-1:2], strict=False)  # records of a view may be wider
        parts = {name: self.read(at, size) for name, at, size in places if size != ABSENT}
        return parts.pop("", b""), parts

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()

    def read(self, block: int, size: int) -> memoryview:
        """A file of a sample."""
        number = int(np.searchsorted(self._begins, block * BLOCK, side="right")) - 1
        begin = block * BLOCK - self._begins[number]
        return self._futures[number].result()[begin : begin + size]


def _sample(row: int, image: Any, parts: Mapping[str, Any], spec: CaptionSpec) -> LinkedSample:
    captions, weights = spec.captions(parts)
    metadata = json.dumps({WEIGHTS: weights}).encode() if len(set(weights)) > 1 else b""
    return LinkedSample(row, _in_a_known_format(bytes(image or b"")), "\n".join(captions).encode(), metadata)


def _in_a_known_format(image: bytes) -> bytes:
    """The image, as a PNG if it is neither JPEG, PNG nor WebP. One that cannot be decoded stays as it is."""
    if image.startswith(_KNOWN):
        return image
    content = io.BytesIO()
    try:
        decode(image, limits_of_build(MAX_PIXELS, MAX_IMAGE)).image().save(content, "PNG", compress_level=1)
    except ImageRefusedError:
        return image
    return content.getvalue()


def options_of(description: Mapping[str, Any], where: str) -> list[ScanOptions]:
    """The options with which a data set was linked: of a view, of all its sources.

    DataError if `captions` of dataset.json, at `where`, is damaged, or has not those of a shard.
    """
    given = description["captions"] if isinstance(description["captions"], list) else []
    found = [ScanOptions(read_spec(one, where), str(one.get("image", ""))) for one in given]
    most = max(one.get("captions", 0) for part in description["splits"].values() for one in part["shards"])
    if most >= len(found):
        raise DataError(f"{where}: wanted the captions of all links, found those of {len(found)}; link again")
    return found
