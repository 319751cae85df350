"""Embeddings on disk: Parquet files of vectors with ids and metadata, and a description (docs/guides/search.md).

    OUT/images.parquet      id, split, row, metadata, vector
    OUT/texts.parquet       id, split, row, metadata, text, vector
    OUT/rejected.jsonl      images that could not be used, one JSON object per line
    OUT/embedding.json      written last: model, source, counts
    OUT/parts/              while the work is not finished: finished parts, and plan.json

A file is written aside, forced to the disk and renamed, so a file with its final name is complete.

Shape legend: n rows, E width of the vectors.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mvlm.errors import RunError
from mvlm.search.collection import Item
from mvlm_dataloading.files import replaced

FORMAT_VERSION = 1
KINDS = ("images", "texts")
# A dictionary of the numbers of vectors, which do not repeat, would take five times as long and a third more room.
PARQUET = {"compression": "zstd", "use_dictionary": ["id", "split", "metadata", "text"]}


class EmbeddingFolder:
    """Paths of the files of one embedding. Nothing is read or made."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, path / "parts"
        self.description, self.plan, self.rejected = (
            path / "embedding.json",
            self.parts / "plan.json",
            path / "rejected.jsonl",
        )
        self.lock = path / ".lock"

    def vectors(self, kind: str) -> Path:
        """Parquet file of all images or texts."""
        return self.path / f"{kind}.parquet"

    def part(self, kind: str, number: int) -> Path:
        """Parquet file of one part."""
        return self.parts / f"{kind}-{number:07d}.parquet"


def is_part(path: Path) -> bool:
    """True for a file that :func:`mvlm.search.embed.embed` writes into the folder of parts, finished or not."""
    return re.fullmatch(r"\.?((images|texts)-\d+\.parquet|plan\.json)(\..*)?", path.name) is not None


def schema_of(kind: str, width: int) -> pa.Schema:
    """Columns of the images or the texts, with vectors as fixed-size lists of float32 (E,)."""
    text = [pa.field("text", pa.string())] if kind == "texts" else []
    return pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("split", pa.string()),
            pa.field("row", pa.int64()),
            pa.field("metadata", pa.string()),
            *text,
            pa.field("vector", pa.list_(pa.float32(), width)),
        ]
    )


def image_table(items: Sequence[Item], vectors: NDArray[np.float32]) -> pa.Table:
    """Rows of images: their items, and vectors float32 (n, E)."""
    return _table("images", [(item.id, item, None) for item in items], vectors)


def text_table(items: Sequence[Item], vectors: NDArray[np.float32]) -> pa.Table:
    """Rows of all captions of the items, in order, with vectors float32 (n, E). The id is the item's with #number."""
    rows = [(f"{item.id}#{number}", item, text) for item in items for number, text in enumerate(item.captions)]
    return _table("texts", rows, vectors)


def _table(kind: str, rows: Sequence[tuple[str, Item, str | None]], vectors: NDArray[np.float32]) -> pa.Table:
    width = vectors.shape[1]
    columns: dict[str, Any] = {
        "id": [id for id, _, _ in rows],
        "split": [item.split for _, item, _ in rows],
        "row": [item.row for _, item, _ in rows],
        "metadata": [_unicode(json.dumps(item.metadata, ensure_ascii=False)) for _, item, _ in rows],
        "text": [text for _, _, text in rows],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), width),
    }
    schema = schema_of(kind, width)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _unicode(text: str) -> str:
    """The text with "?" for each lone surrogate, which JSON may hold and a file in UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole, as one row group."""
    with replaced(path) as aside:
        pq.write_table(table, aside, row_group_size=max(1, len(table)), **PARQUET)


def join_parts(folder: EmbeddingFolder, kind: str, numbers: Iterable[int], width: int) -> int:
    """Write all parts as one Parquet file, one part in memory at a time. Returns the number of rows."""
    rows = 0
    with (
        replaced(folder.vectors(kind)) as aside,
        pq.ParquetWriter(aside, schema_of(kind, width), **PARQUET) as writer,
    ):
        for number in numbers:
            table = pq.read_table(folder.part(kind, number), memory_map=True)
            rows += len(table)
            if len(table):
                writer.write_table(table, row_group_size=len(table))
    return rows


def read_rows(path: Path) -> list[int]:
    """The column `row` of a Parquet file."""
    return pq.read_table(path, columns=["row"])["row"].to_pylist()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one per line, whole."""
    with replaced(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a finished embedding. RunError if the folder holds none, or one of another version."""
    file = EmbeddingFolder(path).description
    if not file.is_file():
        unfinished = EmbeddingFolder(path).plan.is_file()
        found = "one that is not finished" if unfinished else "none"
        hint = "run the same `mvlm embed` again" if unfinished else "check the path, or run `mvlm embed`"
        raise RunError(f"{path}: wanted a folder that `mvlm embed` wrote, found {found}; {hint}")
    return read_versioned(file)


def read_versioned(file: Path) -> dict[str, Any]:
    """A JSON object of this format version. RunError for another one."""
    try:
        value = json.loads(file.read_text())
        version = value["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file}: wanted a description, could not read it ({error!r}); make it again") from None
    if version != FORMAT_VERSION:
        raise RunError(f"{file}: wanted format version {FORMAT_VERSION}, found {version}; make it again")
    return value


def remove_leftovers(folder: EmbeddingFolder) -> None:
    """Remove files that a killed process was writing. The caller holds the lock."""
    for place in (folder.path, folder.parts):
        for file in place.glob(".*.parquet.*") if place.is_dir() else ():
            file.unlink()
    for name in ("embedding.json", "rejected.jsonl"):
        for file in folder.path.glob(f".{name}.*"):
            file.unlink()
    if folder.description.is_file():
        shutil.rmtree(folder.parts, ignore_errors=True)
