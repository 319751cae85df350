"""Hugging Face `datasets` on disk: parquet files of the hub, and folders of `save_to_disk`."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.untrusted import open_parquet, open_regular

from .files import captions_in_row, files_under, read_json, refuse_repeated_files, several_columns
from .record import (
    Record,
    Source,
    canonical_split,
    check_shares,
    file_fingerprint,
    safe_key,
    source,
    split_by_hash,
    split_in_name,
)

_BATCH = 64
_SCANNED = 1 << 16
"""Number of cells that are read at once of the columns of keys and splits."""
# Increment when equal rows give other samples. Data sets of an older revision are then refused, not reused.
_REVISION = 2


@source
def huggingface(
    data: Path,
    /,
    more: Sequence[Path] = (),
    *,
    image_column: str = "image",
    caption_column: tuple[str, ...] = ("caption",),
    key_column: str | None = None,
    split_column: str | None = None,
    split: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "huggingface",
) -> Source:
    """Rows of Hugging Face `datasets` on disk: parquet files, or folders of save_to_disk.

    The package is not needed, and no code of a data set is run.

    Args:
        data: Parquet file, folder of parquet files, or folder of save_to_disk.
        more: Further ones.
        image_column: Column of images, of type `Image` (bytes and a path) or binary.
        caption_column: Columns of captions: strings, or lists of strings.
        key_column: Column of keys. Rows of a file that follow one another and have equal keys and images are one
            sample with all their captions. Default: every row is a sample, and keys are numbers of file and row.
        split_column: Column of splits. Default: split, if there is one. A row without a split has that of its file.
        split: Split of all rows, whatever a column says. Default: that of the column; else the one that save_to_disk
            stored; else the first that is a word of the file's name, or of a folder's from the file up to the given
            one, such as validation/lang=en/0.parquet; else train.
        validation: Share of train to use for validation, chosen by a hash of the key, or of the image without keys.
        test: Share of train to use for test, chosen by a hash of the key, or of the image without keys.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.

    Raises:
        DataError: a column is missing, or a row has no key or an unknown split; `split` and `split_column` are both
            given; neither is, and a file that states an evaluation split has rows of train in its column `split`.
    """
    check_shares(validation, test)
    if split and split_column:
        raise DataError(f"split: wanted one of --split and --split-column, got {split} and {split_column}; give one")
    files = [found for path in (data, *more) for found in _find(path)]
    refuse_repeated_files(path for path, _ in files)
    pieces: list[_RowsPiece] = []
    for number, (path, found_split) in enumerate(files):
        names = _schema(path)
        of_rows = split_column or ("split" if "split" in names and not split else None)
        file = _RowsFile(
            canonical_split(split or found_split or "train", str(path), "rename it, or name the split with --split"),
            path,
            number,
            image_column,
            several_columns(caption_column),
            key_column,
            of_rows,
        )
        file.check(names)
        splits = file.splits()
        if not split_column and file.split != "train" and "train" in splits:
            # The column may tell of the rows' source, such as the splits of COCO, and not of this data set.
            raise DataError(
                f"{path}: wanted rows of {file.split} as the name states, found train in the column split; give "
                f"--split-column split or --split {file.split}"
            )
        if "train" in splits and (validation or test):
            splits = {"train", "validation", "test"}
        shares = (validation, test)
        pieces += [_RowsPiece(one, file, shares) for one in ("train", "validation", "test") if one in splits]
    return Source(
        name=name,
        origin="rows of Hugging Face datasets",
        licence=licence,
        recipe={
            "rows_revision": _REVISION,
            "files": [file_fingerprint(path) for path, _ in files],
            "columns": [image_column, *several_columns(caption_column), key_column, split_column],
            "validation": validation,
            "test": test,
            **({"split": split} if split else {}),
        },
        pieces=pieces,
    )


def _find(path: Path) -> list[tuple[Path, str | None]]:
    """Find the files of rows at a path: (file, split that save_to_disk, the file's or a folder's name states, or None).

    The split is None if none of them states one.
    """
    if path.is_file():
        return [(path, split_in_name(path.name))]
    if (path / "dataset_dict.json").is_file():
        content = read_json(path / "dataset_dict.json")
        splits = content.get("splits", []) if isinstance(content, dict) else None
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise DataError(f"{path}: wanted a folder of save_to_disk, found {splits!r} as splits; save the rows again")
        if wrong := [split for split in splits if Path(split).name != split]:
            raise DataError(f"{path}: wanted splits that are folders in it, found {wrong[0]!r}; save the rows again")
        return [(file, split) for split in splits for file, _ in _find(path / split)]
    if (path / "state.json").is_file():
        state = read_json(path / "state.json")
        try:
            named = state.get("_split") or split_in_name(path.absolute().name)
            return [(path / Path(entry["filename"]).name, named) for entry in state["_data_files"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: wanted a folder of save_to_disk, found {error!r}; save the rows again") from None
    found = [file for file in files_under(path) if file.suffix == ".parquet"] if path.is_dir() else []
    if not found:
        raise DataError(f"{path}: wanted parquet files or a folder of save_to_disk, found none; save the rows there")
    return [(file, _split_in_path(path, file)) for file in found]


def _split_in_path(folder: Path, file: Path) -> str | None:
    """The split that a file's name states, or the nearest of its folders up to `folder`; None if none does."""
    names = [folder.absolute().name, *file.relative_to(folder).parts]
    return next(filter(None, map(split_in_name, reversed(names))), None)


@dataclass(frozen=True, slots=True)
class _RowsFile:
    """A parquet or Arrow file of rows, and the columns that are read from it."""

    split: str
    """Split of the rows that state none."""
    path: Path
    number: int
    image_column: str
    caption_columns: tuple[str, ...]
    key_column: str | None
    split_column: str | None

    @property
    def columns(self) -> list[str]:
        named = (self.image_column, *self.caption_columns, self.key_column, self.split_column)
        return [*dict.fromkeys(filter(None, named))]

    def check(self, names: list[str]) -> None:
        """Check that the file, whose columns are `names`, has all columns, and a key in every row."""
        for column in self.columns:
            if column not in names:
                raise DataError(
                    f"{self.path}: wanted a column named {column}, found {', '.join(names)}; name the columns with "
                    f"--image-column, --caption-column, --key-column and --split-column"
                )
        if self.key_column:
            # A null is no key: converted to text, it would be the key "None" of all such rows.
            cells = [batch.column(0) for batch in _batches(self.path, [self.key_column], _SCANNED)]
            if empty := sum(part.null_count for part in cells):
                raise DataError(
                    f"{self.path}: wanted a key in every row of the column {self.key_column}, found none in {empty} of "
                    f"{sum(map(len, cells))}; fill them in, or leave --key-column out"
                )

    def splits(self) -> set[str]:
        """Set of the splits that the rows have. Reads the column of splits alone."""
        if self.split_column is None:
            return {self.split}
        batches = _batches(self.path, [self.split_column], _SCANNED)
        cells = (row[self.split_column] for batch in batches for row in _rows(batch))
        return set(map(self.split_of, cells)) or {self.split}

    def split_of(self, cell: Any) -> str:
        """Split of a row, from its `cell` in the column of splits; the file's own split for an empty cell."""
        if cell is None or cell == "":
            return self.split
        try:
            return canonical_split(cell, str(self.path))
        except DataError:
            raise DataError(
                f"{self.path}: wanted train, validation or test in the column {self.split_column}, found {cell!r}; "
                f"correct the rows, name another column with --split-column, or give one --split for all rows"
            ) from None

    def samples(self) -> Iterator[tuple[str, str, Record]]:
        """Yield (split, text, record) of each sample.

        The text's hash assigns a sample of train to an evaluation share.
        """
        last: tuple[str, str, Record] | None = None
        captions: list[str] = []
        rows = chain.from_iterable(map(_rows, _batches(self.path, self.columns, _BATCH)))
        for number, row in enumerate(rows):
            where = f"{self.path.name} row {number}"
            key = safe_key(str(row[self.key_column]) if self.key_column else f"{self.number:05d}-{number:08d}")
            split = self.split_of(row[self.split_column]) if self.split_column else self.split
            image, fault = _image(row[self.image_column])
            if last is not None and self.key_column and key == last[2].key and image in (None, last[2].image):
                if split != last[0]:
                    raise DataError(
                        f"{self.path} row {number}: wanted one split for the key {row[self.key_column]}, found "
                        f"{last[0]} and {split}; correct the rows"
                    )
                captions += captions_in_row(row, self.caption_columns)  # in place: the last record has this list
                continue
            if last is not None:
                yield last
            # Rows of one image have different numbers. By its bytes they stay in one split, and are known as one image.
            hashed, metadata = key, {}
            if image is not None and not self.key_column:
                hashed = hashlib.sha256(image).hexdigest()
                metadata["image_id"] = f"sha256 {hashed[:32]}"
            captions = captions_in_row(row, self.caption_columns)
            last = split, hashed, Record(key, image, captions, where, metadata, fault)
        if last is not None:
            yield last


@dataclass(frozen=True, slots=True)
class _RowsPiece:
    """Piece of a build: the samples of one split in a file of rows.

    shares: of the samples of train, those that go to validation and to test.
    """

    split: str
    file: _RowsFile
    shares: tuple[float, float]

    @property
    def label(self) -> str:
        return f"{self.split} {self.file.path.name} {self.file.number}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        for split, hashed, record in self.file.samples():
            if (split_by_hash(hashed, *self.shares) if split == "train" else split) == self.split:
                yield record


def _image(cell: Any) -> tuple[bytes | None, str | None]:
    if isinstance(cell, dict):
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            return None, "image is a path and not in the table"  # a path on the machine that wrote the table
        cell = content
    return (cell, None) if isinstance(cell, bytes) or cell is None else (None, "image is not binary")


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow record batch as dictionaries.

    Bytes in a text that are not UTF-8 become lone surrogates.
    """
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        columns = ([_value(cell) for cell in batch.column(i)] for i in range(batch.num_columns))
        yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _value(cell: Any) -> Any:
    """Python value of an Arrow scalar. Bytes in a text that are not UTF-8 become lone surrogates (surrogateescape)."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if hasattr(cell, "as_buffer"):
            return cell.as_buffer().to_pybytes().decode(errors="surrogateescape")
        values = getattr(cell, "values", None)  # of a list
        return None if values is None else [_value(one) for one in values]


def _schema(path: Path) -> list[str]:
    arrow = need("pyarrow")
    try:
        if path.suffix == ".parquet":
            return open_parquet(path).schema_arrow.names
        with _open_stream(path) as stream:
            return stream.schema.names
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: wanted a file of rows, found {error}; download or save it again") from None


def _batches(path: Path, columns: list[str], size: int) -> Iterator[Any]:
    """Yield the rows of a file as record batches of at most `size` rows."""
    arrow = need("pyarrow")
    try:
        if path.suffix == ".parquet":
            yield from open_parquet(path).iter_batches(batch_size=size, columns=columns)
        else:
            with _open_stream(path) as stream:
                for batch in stream:
                    for begin in range(0, batch.num_rows, size):
                        yield batch.select(columns).slice(begin, size)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: wanted rows, found {error}; download or save it again") from None


def _open_stream(path: Path) -> Any:
    arrow, ipc = need("pyarrow"), need("pyarrow.ipc")
    open_regular(path).close()
    return ipc.open_stream(arrow.memory_map(str(path)))
