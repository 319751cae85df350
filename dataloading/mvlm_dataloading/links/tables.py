"""Parquet files: a scan of their rows, and rows read by whole row groups.

A footer is read first, then the pages of the columns that are wanted, a row group at a time. The image's column holds
bytes, or structs with bytes as `datasets` writes them.
"""

import bisect
import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from mvlm_dataloading.dataset.sample_index import ABSENT
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.untrusted import LIMITS

from .captions import CaptionSpec
from .scan import NO_TEXT, Scan, ScanOptions, columns_of, image_fault
from .store import LinkedFile, RangeStore

MAX_GROUP = 1 << 30
"""Most bytes of the wanted columns of a row group, packed or not."""
_RANGE = 64 << 20
_GAP = 64
"""Bytes between two columns are read with them, rather than by two ranges, if they are so many times fewer."""
_AHEAD_BYTES = 64 << 20
"""Bytes of row groups that are read before they are wanted, of a file that is read in order."""
_AHEAD = 32

Rows = list[tuple[memoryview | None, dict[str, Any]]]
"""The image of each row, None if it has none or was not asked for, and the values of its columns with captions."""


class Table(NamedTuple):
    """Footer of a linked Parquet file."""

    linked: LinkedFile
    metadata: Any
    """`pyarrow.parquet.FileMetaData`."""
    names: tuple[str, ...]
    """All columns."""
    image: str
    """Column of the images."""
    captions: tuple[str, ...]
    """Columns with captions."""
    first: list[int]
    """Number of the first row of each row group, and the number of rows."""

    def group_of(self, row: int) -> int:
        """Row group of a row."""
        return bisect.bisect_right(self.first, row) - 1


def open_table(store: RangeStore, linked: LinkedFile, captions: CaptionSpec, image: str = "") -> Table:
    """Read the footer of a Parquet file, and find the columns.

    Raises:
        DataError: it cannot be read, is no Parquet file, or lacks a column.
    """
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    if linked.size < 12:
        raise _refused(linked, "another or a part of one")
    end = bytes(store.read(linked, linked.size - 8, linked.size))
    footer = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or not 0 < footer <= linked.size - 12:
        raise _refused(linked, "another or a part of one")
    if footer > LIMITS["footer"]:
        raise _refused(linked, f"a footer of {footer} bytes, above {LIMITS['footer']}")
    reader = _Reader(store, linked)
    reader.fetch([(linked.size - 8 - footer, linked.size)])
    try:
        file = parquet.ParquetFile(arrow.PythonFile(reader, mode="r"))
        schema, metadata = file.schema_arrow, file.metadata
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except DataError:
        raise
    except Exception:  # pyarrow's errors for damage are of many kinds
        raise _refused(linked, "a damaged footer") from None
    if any(count < 0 for count in rows) or sum(rows) >= ABSENT:
        raise _refused(linked, "a damaged footer")
    first = [0]
    for count in rows:
        first.append(first[-1] + count)
    column, texts = _image_column(linked, schema, image), _caption_columns(linked, schema, captions)
    return Table(linked, metadata, tuple(schema.names), column, texts, first)


def scan_table(store: RangeStore, linked: LinkedFile, options: ScanOptions) -> Scan:
    """Scan a Parquet file. Raises DataError as `open_table`, and for a row group that is damaged or too large."""
    found = Scan(columns_of(options.captions))
    table = open_table(store, linked, options.captions, options.image)
    _require_readable(store, table)
    texts = [NO_TEXT] * len(options.captions.files)
    groups = range(len(table.first) - 1)
    for group, rows in zip(groups, read_groups(store, table, groups), strict=True):
        before = len(found.numbers)
        for row, (image, values) in enumerate(rows, table.first[group]):
            found.fields.update(table.names)
            captions, _ = options.captions.captions(values)
            fault = "no image" if image is None else image_fault(image)
            if image is None or fault is not None or not captions:
                found.left_out[fault or "no caption"] += 1
            else:
                found.add(str(row), row, len(image), texts, len(captions))
        if len(found.numbers) > before:
            found.groups.append((len(found.numbers) - before) // found.columns)
    return found


def _require_readable(store: RangeStore, table: Table) -> None:
    """Raise DataError for encrypted columns.

    NOTE: pyarrow ends the process if it is asked where such a column is. Reading a row first gives an error.
    """
    parquet, reader = need("pyarrow.parquet"), need("pyarrow").PythonFile(_Reader(store, table.linked), mode="r")
    try:
        file = parquet.ParquetFile(reader, metadata=table.metadata, pre_buffer=False, buffer_size=1 << 16)
        columns = [table.image, *table.captions]
        next(file.iter_batches(1, row_groups=[0], columns=columns, use_threads=False), None) if table.first[
            1:
        ] else None
    except DataError:
        raise
    except Exception:  # pyarrow's errors are of many kinds
        raise _refused(table.linked, "encrypted columns, or a damaged row group 0") from None


def read_groups(store: RangeStore, table: Table, groups: Iterable[int], *, images: bool = True) -> Iterator[Rows]:
    """Rows of some row groups, one after another, of which the next ones are read meanwhile. Errors of `read_group`."""
    left, waiting = deque(groups), deque[Future[Rows]]()
    ahead = max(2, min(_AHEAD, _AHEAD_BYTES * len(table.first) // max(1, table.linked.size)))
    try:
        while left or waiting:
            while left and len(waiting) < ahead:
                waiting.append(store.call(partial(read_group, store, table, left.popleft(), images=images)))
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()


def read_group(store: RangeStore, table: Table, group: int, *, images: bool = True) -> Rows:
    """Rows of a row group, of which the wanted columns alone are read. Without `images` their images are None.

    Raises:
        DataError: it cannot be read, is damaged, or is too large.
    """
    columns, reader = [*([table.image] if images else []), *table.captions], _Reader(store, table.linked)
    parquet, arrow = need("pyarrow.parquet"), need("pyarrow")
    try:
        metadata = table.metadata.row_group(group)
        chunks = [metadata.column(number) for number in range(metadata.num_columns)]
        chunks = [one for one in chunks if any(f"{one.path_in_schema}.".startswith(f"{name}.") for name in columns)]
        sizes = [(one.total_compressed_size, one.total_uncompressed_size) for one in chunks]
        begins = [
            min(place for place in (one.dictionary_page_offset, one.data_page_offset) if place)
            for one in chunks
        ]  # fmt: skip
    except Exception:
        raise _refused(table.linked, "a damaged footer") from None
    if min(map(min, sizes)) < 0 or max(map(sum, zip(*sizes, strict=True))) > MAX_GROUP:
        raise _refused(table.linked, f"a row group of more than {MAX_GROUP >> 20} MiB of images and captions")
    reader.fetch([(begin, begin + size) for begin, (size, _) in zip(begins, sizes, strict=True)])
    try:
        file = parquet.ParquetFile(arrow.PythonFile(reader, mode="r"), metadata=table.metadata, pre_buffer=False)
        found = file.read_row_group(group, columns=columns, use_threads=False)
        if len(found) != table.first[group + 1] - table.first[group]:
            raise ValueError
    except DataError:
        raise
    except Exception:  # pyarrow's errors for damage are of many kinds
        raise _refused(table.linked, f"a damaged row group {group}") from None
    cells = found.column(table.image) if images else None
    others, rows = [(name, found.column(name)) for name in table.captions], list[Any]()
    for row in range(len(found)):
        try:
            image = None if cells is None else _image(cells[row])
            rows.append((image, {name: one[row].as_py() for name, one in others}))
        except Exception:  # a text that is not UTF-8, for example
            raise _refused(table.linked, f"a damaged row {table.first[group] + row}") from None
    return rows


class _Reader(io.RawIOBase):
    """A linked file for pyarrow: what was fetched is in memory, all else is read by ranges."""

    def __init__(self, store: RangeStore, linked: LinkedFile):
        super().__init__()
        self._store, self._linked, self._at = store, linked, 0
        self._parts: list[tuple[int, memoryview]] = []

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges. Neighbours are one request."""
        joined: list[list[int]] = []
        for begin, end in sorted(ranges):
            if joined and _GAP * (begin - joined[-1][1]) <= joined[-1][1] - joined[-1][0]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([begin, end])
        cuts = [(place, min(place + _RANGE, end)) for begin, end in joined for place in range(begin, end, _RANGE)]
        self._parts = [(begin, self._store.read(self._linked, begin, end)) for begin, end in cuts]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        self._at = place + (0, self._at, self._linked.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._linked.size if size is None or size < 0 else min(self._at + size, self._linked.size)
        found = []
        while self._at < end:
            content = self._from(self._at, end)
            found.append(content)
            self._at += len(content)
        return b"".join(found)

    def _from(self, begin: int, end: int) -> memoryview:
        for place, content in self._parts:
            if place <= begin < place + len(content):
                return content[begin - place : end - place]
        return self._store.read(self._linked, begin, min(end, begin + _RANGE))


def _image(value: Any) -> memoryview | None:
    """The bytes of an image's cell; None if it has none."""
    if value.is_valid and hasattr(value, "keys"):  # a struct
        value = value["bytes"]
    return memoryview(value.as_buffer()) if value.is_valid else None


def _image_column(linked: LinkedFile, schema: Any, name: str) -> str:
    types = need("pyarrow").types

    def has_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(one.name == "bytes" and has_bytes(one.type) for one in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [one.name for one in schema if has_bytes(one.type)]
    if name in found or (not name and len(found) == 1):
        return name or found[0]
    wanted = f"the column {name} with the bytes of images" if name else "one column with the bytes of images"
    raise DataError(
        f"{linked.url}: wanted {wanted}, found {_listed(found)}; name it with --image, or build the data with "
        "`mvlm data huggingface`"
    )


def _caption_columns(linked: LinkedFile, schema: Any, captions: CaptionSpec) -> tuple[str, ...]:
    found = tuple(name for name in captions.files if name in schema.names)
    if not found:
        raise DataError(
            f"{linked.url}: wanted the captions in {', '.join(captions.files)}, found the columns "
            f"{_listed(schema.names)}; name theirs with --caption"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name for name in names[:20] if name.isprintable())[:200] or "none"


def _refused(linked: LinkedFile, found: str) -> DataError:
    return DataError(f"{linked.url}: wanted a Parquet file, found {found}; make it again, or leave it out")
