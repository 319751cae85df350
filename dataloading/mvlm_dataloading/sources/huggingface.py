"""Hugging Face `datasets` on disk: parquet files of the hub, and folders of `save_to_disk`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError, need

from .files import captions_in_cell, files_under, read_json, refuse_repeated_files
from .record import (
    Piece,
    Record,
    Source,
    canonical_split,
    check_shares,
    file_fingerprint,
    looks_like_evaluation,
    safe_key,
    split_by_hash,
)

_BATCH = 64


def huggingface(
    data: Sequence[Path],
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    key_column: str | None = None,
    split: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "huggingface",
) -> Source:
    """Rows of Hugging Face `datasets` on disk. The package is not needed, and no code of a data set is run.

    Args:
        data: parquet files, folders of parquet files, or folders of `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk`.
        image_column: column of images, of type `Image` (bytes and a path) or binary.
        caption_column: column of captions: a string or a list of strings.
        key_column: column of the samples' keys. Default: keys consist of the numbers of file and row.
        split: split of all rows. Default: the split given by `save_to_disk` or the file's name, such as
            train-00000-of-00002.parquet; else train.
        validation, test: shares of train that become these splits, chosen by a hash of the key.

    Raises:
        DataError: no rows are found, or a column is missing.
    """
    check_shares(validation, test)
    files = [found for path in data for found in _find(path)]
    refuse_repeated_files(path for path, _ in files)
    pieces: list[Piece] = []
    for number, (path, found_split) in enumerate(files):
        rows = _RowsPiece(
            canonical_split(split or found_split or "train", str(path), "rename it, or name the split with --split"),
            path,
            number,
            image_column,
            caption_column,
            key_column,
        )
        rows.check_columns()
        pieces += rows.by_hash(validation, test)
    return Source(
        name=name,
        origin="rows of Hugging Face datasets",
        licence=licence,
        recipe={
            "files": [file_fingerprint(path) for path, _ in files],
            "columns": [image_column, caption_column, key_column],
            "validation": validation,
            "test": test,
            **({"split": split} if split else {}),
        },
        pieces=pieces,
    )


def _find(path: Path) -> list[tuple[Path, str | None]]:
    """Find files of rows, each with the split that it states, or None."""
    if path.is_file():
        return [(path, _split_in(path.name))]
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
            named = state.get("_split")
            return [(path / Path(entry["filename"]).name, named) for entry in state["_data_files"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: wanted a folder of save_to_disk, found {error!r}; save the rows again") from None
    found = [file for file in files_under(path) if file.suffix == ".parquet"] if path.is_dir() else []
    if not found:
        raise DataError(f"{path}: wanted parquet files or a folder of save_to_disk, found none; save the rows there")
    return [(file, _split_in(file.name) or _split_in(file.parent.name)) for file in found]


def _split_in(name: str) -> str | None:
    # The hub's own conversion names a truncated split partial-train.
    match = re.match(r"(?:partial-)?(train|training|validation|valid|val|dev|test|testing)(?=[-_.]|$)", name.lower())
    if match is None and looks_like_evaluation(word := re.split(r"[-_.]", name.lower())[0]):
        return word  # such as testA of RefCOCO, which is refused: it must not become training data
    return match[1] if match else None


@dataclass(frozen=True, slots=True)
class _RowsPiece:
    """A file of rows as a piece. With `shares`, only the rows that a hash of the key assigns to `split`."""

    split: str
    path: Path
    number: int
    image_column: str
    caption_column: str
    key_column: str | None
    shares: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        return f"{self.split} {self.path.name} {self.number}"

    def by_hash(self, validation: float, test: float) -> list["_RowsPiece"]:
        if self.split != "train" or not validation + test:
            return [self]
        same = (self.path, self.number, self.image_column, self.caption_column, self.key_column, (validation, test))
        return [_RowsPiece(split, *same) for split in ("train", "validation", "test")]

    def check_columns(self) -> None:
        names = _schema(self.path)
        for column in (self.image_column, self.caption_column, *filter(None, (self.key_column,))):
            if column not in names:
                raise DataError(
                    f"{self.path}: wanted a column named {column}, found {', '.join(names)}; name the columns with "
                    f"--image-column and --caption-column"
                )

    def records(self, max_bytes: int) -> Iterator[Record]:
        columns = [*dict.fromkeys(filter(None, (self.image_column, self.caption_column, self.key_column)))]
        for number, row in enumerate(_rows(self.path, columns)):
            where = f"{self.path.name} row {number}"
            named = row[self.key_column] if self.key_column else f"{self.number:05d}-{number:08d}"
            key = safe_key(str(named))
            if self.shares is not None and split_by_hash(key, *self.shares) != self.split:
                continue
            image, fault = self._image(row[self.image_column])
            yield Record(key, image, captions_in_cell(row[self.caption_column]), where, {}, fault)

    def _image(self, cell: Any) -> tuple[bytes | None, str | None]:
        if isinstance(cell, dict):
            content = cell.get("bytes")
            if content is None and cell.get("path"):
                return None, "image is a path and not in the table"  # a path on the machine that wrote the table
            cell = content
        return (cell, None) if isinstance(cell, bytes) or cell is None else (None, "image is not binary")


def _schema(path: Path) -> list[str]:
    arrow = need("pyarrow")
    try:
        if path.suffix == ".parquet":
            return need("pyarrow.parquet").ParquetFile(path).schema_arrow.names
        with _open_stream(path) as stream:
            return stream.schema.names
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: wanted a file of rows, found {error}; download or save it again") from None


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    arrow = need("pyarrow")
    try:
        if path.suffix == ".parquet":
            batches = need("pyarrow.parquet").ParquetFile(path).iter_batches(batch_size=_BATCH, columns=columns)
            for batch in batches:
                yield from batch.to_pylist()
        else:
            with _open_stream(path) as stream:
                for batch in stream:
                    for begin in range(0, batch.num_rows, _BATCH):
                        yield from batch.select(columns).slice(begin, _BATCH).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: wanted rows, found {error}; download or save it again") from None


def _open_stream(path: Path) -> Any:
    arrow, ipc = need("pyarrow"), need("pyarrow.ipc")
    return ipc.open_stream(arrow.memory_map(str(path)))
