"""A search index: vectors of images and texts with their metadata, in LanceDB, in a folder or an object store.

An index has the tables `images` and `texts`, with the columns of the embedding files, a `key` that is unique in the
index, the number of the `source`, and a column for each field of the metadata. The table `about` has one row with the
model's hash and the sources, as JSON.

Shape legend: n rows, E width of the vectors.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from mvlm.errors import ConfigError, RunError
from mvlm.search import inverted_file
from mvlm.search.embedding_files import FORMAT_VERSION, KINDS, EmbeddingFolder, read_description
from mvlm.search.engine import connect, filter_errors, read_about, short, table_names, write_about
from mvlm.search.metadata import columns_of, types_in

log = logging.getLogger(__name__)
BATCH_ROWS = 8192
APPROXIMATE_FROM = 100_000
"""Rows from which `auto` builds an inverted file. Below, a full product takes milliseconds and is exact."""
LOCK = ".lock"
"""File in the folder of an index that the process holds which changes it."""


class Hit(NamedTuple):
    """An answer of a query."""

    id: str
    split: str
    source: int
    """Number of the collection in `SearchIndex.sources`."""
    row: int
    text: str
    """Empty for an image."""
    similarity: float
    """Cosine similarity with the query."""
    metadata: dict[str, Any]
    score: float | None = None
    """ITC logit plus ITM's log-odds, of an answer that was re-ranked."""


@dataclass
class SearchIndex:
    """An index that exists. `create_index` and `open_index` make one."""

    location: str
    about: dict[str, Any]
    _database: Any

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Collections of the index, as `open_collection` opens them."""
        return self.about["sources"]

    def check_model(self, sha256: str, what: str) -> None:
        """Raise RunError unless vectors of the model `sha256` can be compared with those of the index."""
        if sha256 != self.about["model"]:
            raise RunError(
                f"{self.location}: wanted {what} of the model {self.about['model'][:12]}... of this index, found "
                f"{sha256[:12]}...; use that model ({self.about['checkpoint'] or 'unnamed'}) or make another index"
            )

    def count(self, kind: str) -> int:
        """Rows of `images` or `texts`."""
        return self._table(kind).count_rows()

    def add(self, embeddings: Path) -> dict[str, int]:
        """Add embeddings. Returns the rows added or replaced, by kind.

        Rows that the index has already are replaced; rows of these splits that the collection no longer has, removed.

        Processes of this machine take turns; those of several, that share an object store, must not add at once.
        """
        description = read_description(embeddings)
        self.check_model(description["model"], "embeddings")
        columns = types_in(EmbeddingFolder(embeddings).vectors("images"))
        if narrow := columns.too_narrow(self._table("images").schema):
            raise RunError(
                f"{embeddings}: wanted whole numbers in the metadata's field {narrow[0]!r}, as in {self.location}, "
                f"found others; make an index of these embeddings, and add the other collections to it"
            )
        with _turn_at(self.location):
            self.reload()  # another process may have added
            number = self._number_of(description["source"])
            splits = description["source"].get("splits", [""])
            for kind in KINDS:
                table, keys = self._table(kind), set()
                for batch in _batches(EmbeddingFolder(embeddings).vectors(kind), table.schema, number):
                    merge = table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
                    merge.execute(pa.Table.from_batches([batch]))
                    keys.update(batch["key"].to_pylist())
                _remove_others(table, f"source = {number} and split in ({_listed(splits)})", keys)
                table.optimize()
        return {kind: description[kind] for kind in KINDS}

    def reload(self) -> None:
        """Read again what the index holds, after another process has added to it."""
        self.about = read_about(self._database, self.location)

    def _number_of(self, source: dict[str, Any]) -> int:
        """Number of a collection. It is added to the index if it is new, or if some of its splits are."""
        places = [(known["kind"], known["path"]) for known in self.sources]
        if (place := (source["kind"], source["path"])) not in places:
            places.append(place)
            self.sources.append(source)
        number = places.index(place)
        known = self.sources[number]
        if "splits" in known:
            known["splits"] = list(dict.fromkeys([*known["splits"], *source["splits"]]))
        write_about(self._database, self.about)
        return number

    def remove(self, where: str) -> dict[str, int]:
        """Remove the rows that a filter chooses, from both tables. Returns their numbers, by kind.

        ConfigError if it does not fit one of them; then nothing is removed.
        """
        tables = {kind: self._table(kind) for kind in KINDS}
        for table in tables.values():
            with filter_errors(where, table.schema):
                table.count_rows(where)
        removed = {}
        with _turn_at(self.location):
            for kind, table in tables.items():
                with filter_errors(where, table.schema):
                    before = table.count_rows()
                    table.delete(where)
                    removed[kind] = before - table.count_rows()
                table.optimize()
        return removed

    def search(
        self, vector: NDArray[np.float32], kind: str = "images", top: int = 10, where: str | None = None
    ) -> list[Hit]:
        """The `top` rows most similar to a vector (E,) of unit length, best first.

        Args:
            kind: images or texts.
            where: SQL condition on columns, such as "split = 'test' and width > 200".
        """
        if kind not in KINDS:
            raise ConfigError(f"kind: wanted {' or '.join(KINDS)}, got {kind!r}")
        if top < 1:
            raise ConfigError(f"top: wanted at least 1, got {top}")
        table = self._table(kind)
        columns = [name for name in ("id", "split", "source", "row", "metadata", "text") if name in table.schema.names]
        query = table.search(vector, vector_column_name="vector")
        top = min(top, max(1, table.count_rows()))  # the engine takes no number above 2^63
        query = inverted_file.limit(query, top, inverted_file.cells_read(self.about["partitions"].get(kind, 0)))
        if where is not None:
            query = query.where(where)
        with filter_errors(where, table.schema):
            rows = query.select([*columns, "vector", "_distance"]).to_arrow().to_pylist()
        hits = [
            Hit(
                row["id"], row["split"], row["source"], row["row"], row.get("text") or "",
                float(np.asarray(row["vector"], np.float64) @ vector.astype(np.float64)), json.loads(row["metadata"]),
            )
            for row in rows
        ]  # fmt: skip
        return sorted(hits, key=lambda hit: (-hit.similarity, hit.source, hit.split, hit.row))[:top]

    def first_captions(self, hits: Sequence[Hit]) -> list[str]:
        """The first caption of each image; empty for one without captions."""
        if not hits:
            return []
        ids, rows = _listed({f"{hit.id}#0" for hit in hits}), ", ".join({str(hit.row) for hit in hits})
        table = self._table("texts")  # not by `key`: indices of earlier versions have others
        found = table.search().where(f"id in ({ids}) and row in ({rows})").limit(max(1, table.count_rows()))
        found = found.select(["source", "split", "row", "id", "text"]).to_list()
        known = {(row["source"], row["split"], row["row"], row["id"]): row["text"] for row in found}
        return [known.get((hit.source, hit.split, hit.row, f"{hit.id}#0"), "") for hit in hits]

    def _table(self, kind: str) -> Any:
        try:
            return self._database.open_table(kind)
        except Exception as error:
            raise RunError(
                f"{self.location}: wanted the {kind} of the index, could not read them: {short(error)}; make it again"
            ) from None


def _turn_at(location: str) -> contextlib.AbstractContextManager[Any]:
    """Context that one process at a time enters. An object store has no locks."""
    return contextlib.nullcontext() if "://" in location else FileLock(Path(location) / LOCK)


def create_index(embeddings: Path, location: str, method: str = "auto") -> SearchIndex:
    """Make an index of embeddings. An index that is there is an error; what an interrupted call left is replaced.

    Args:
        location: folder, or URL of an object store (s3://, gs://, az://).
        method: flat (a full product, exact), ivf (an inverted file, approximate), or auto: ivf from 100,000 rows on.

    Raises:
        RunError: the embeddings are missing or unfinished, or the index exists.
        ConfigError: lancedb is not installed, or there is no such method.
    """
    if method not in ("auto", "flat", "ivf"):
        raise ConfigError(f"method: wanted auto, flat or ivf, got {method!r}")
    description = read_description(embeddings)
    if "://" not in location and not Path(location).is_file():
        Path(location).mkdir(parents=True, exist_ok=True)
    with _turn_at(location):
        return _create(embeddings, description, location, method)


def _create(embeddings: Path, description: dict[str, Any], location: str, method: str) -> SearchIndex:
    database = connect(location)
    if "about" in table_names(database):
        raise RunError(
            f"{location}: wanted a new place for the index, found an index; add to it, or choose another one"
        )
    if "://" not in location and Path(location).is_dir():
        foreign = {path.name for path in Path(location).iterdir()} - {LOCK, *(f"{kind}.lance" for kind in KINDS)}
        if foreign:
            raise RunError(f"{location}: wanted a new or empty folder for the index, found other files; choose another")
    about = {
        "format_version": FORMAT_VERSION,
        "model": description["model"],
        "checkpoint": description["checkpoint"],
        "width": description["width"],
        "sources": [description["source"]],
        "partitions": {},
    }
    for kind in KINDS:
        file = EmbeddingFolder(embeddings).vectors(kind)
        schema = _table_schema(file, EmbeddingFolder(embeddings).vectors("images"))
        rows = description[kind]
        batches = _batches(file, schema, 0) if rows else None  # the engine takes no empty iterator
        table = database.create_table(kind, batches, schema=schema, mode="overwrite")
        if method == "ivf" or (method == "auto" and rows >= APPROXIMATE_FROM):
            about["partitions"][kind] = inverted_file.build(table, rows, about["width"])
    write_about(database, about)  # last: an index without it is unfinished
    return SearchIndex(location, about, database)


def open_index(location: str) -> SearchIndex:
    """Open an index. RunError if there is none, or one of another version."""
    if "://" not in location and not Path(location).is_dir():
        raise RunError(
            f"{location}: wanted an index that `mvlm search index` made, found no such folder; check the path"
        )
    database = connect(location)
    if "about" not in table_names(database):
        raise RunError(f"{location}: wanted an index that `mvlm search index` made, found none; check the path")
    return SearchIndex(location, read_about(database, location), database)


def _table_schema(file: Path, images: Path) -> pa.Schema:
    """Columns of an index of a Parquet file of embeddings.

    Both tables have a column for each field of the `images`' metadata, so a filter means the same in both.
    """
    own = [pa.field("key", pa.string()), pa.field("source", pa.int32())]
    return pa.schema([*own, *pq.read_schema(file), *types_in(images).fields()])


def _listed(texts: Iterable[str]) -> str:
    """Texts as literals of SQL."""
    return ", ".join("'" + text.replace("'", "''") + "'" for text in texts)


def _remove_others(table: Any, where: str, keys: set[str]) -> None:
    """Remove the rows that a filter chooses, but for those with these keys."""
    if (rows := table.count_rows(where)) == len(keys):
        return
    found = table.search().where(where).select(["key"]).limit(rows).to_arrow()["key"].to_pylist()
    gone = [key for key in found if key not in keys]
    for start in range(0, len(gone), BATCH_ROWS):
        table.delete(f"key in ({_listed(gone[start : start + BATCH_ROWS])})")


def _batches(file: Path, schema: pa.Schema, source: int) -> Iterator[pa.RecordBatch]:
    """Rows of a Parquet file of embeddings, as rows of an index."""
    given = set(pq.read_schema(file).names)
    extra = [field for field in schema if field.name not in {*given, "key", "source"}]
    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
        columns: dict[str, Any] = {name: batch[name] for name in given}
        keys = zip(*(batch[name].to_pylist() for name in ("row", "split", "id")), strict=True)
        # With the row, because a split may have an id twice.
        columns["key"] = pa.array([f"{source}/{row}/{split}/{id}" for row, split, id in keys])
        columns["source"] = pa.array([source] * len(batch), pa.int32())
        columns |= columns_of(batch["metadata"].to_pylist(), extra)
        yield pa.RecordBatch.from_arrays(
            [columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema
        )
