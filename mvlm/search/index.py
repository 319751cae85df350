"""A search index: vectors of images and texts with their metadata, in LanceDB, in a folder or an object store.

An index has the tables `images` and `texts`, with the columns of the embedding files, a `key` that is unique in the
index, the number of the `source`, and a column for each field of the metadata. The table `about` has one row with the
model's hash and the sources, as JSON.

Shape legend: n rows, E width of the vectors.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from mvlm.errors import ConfigError, RunError
from mvlm.files import LOCK
from mvlm.schemas import IndexAbout, IndexRow, check
from mvlm.search.embed import BATCH_ROWS, FORMAT_VERSION, KINDS, READABLE, read_batches, read_description, schema_of
from mvlm.untrusted import run_errors
from mvlm_dataloading.untrusted import check_links, parse_json
from mvlm_dataloading.urls import shown

STORES = ("s3", "gs", "az")
"""Schemes of URLs at which an index may be. LanceDB accepts others, one of which stores nothing."""
APPROXIMATE_FROM = 100_000
"""Rows from which `auto` builds an inverted file with product quantisation (docs/evidence/tasks.md has measurements).
Below, a full product takes milliseconds and is exact."""
PROBED, LEAST_PROBED = 1 / 10, 40
"""Share of an inverted file's cells that a query reads, and the fewest: a tenth of few cells finds less."""
REFINED = 8
"""`refine_factor` of LanceDB: exact similarities are computed for so many candidates per wanted answer."""
MARGIN = 16
"""Answers that are asked of LanceDB beyond those wanted: it sorts by float32 sums, we sort again by float64 sums."""
RESERVED = ("key", "source", "id", "split", "row", "image", "metadata", "text", "vector")
OWN_COLUMNS = [pa.field("key", pa.string()), pa.field("source", pa.int32())]
"""Columns of an index that embedding files do not have: unique key of a row, and number of its collection."""
MAX_COLUMNS = 64
TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


class Hit(NamedTuple):
    """An answer of a query."""

    id: str
    split: str
    source: int
    """Number of the collection in `SearchIndex.sources`."""
    row: int
    image: str
    """SHA-256 of the encoded image; empty in an index of version 1."""
    text: str
    """Text of the answer; empty for an image."""
    similarity: float
    """Cosine similarity with the query."""
    metadata: dict[str, Any]
    score: float | None = None
    """ITC logit plus ITM's log-odds, of an answer that was re-ranked."""

    @property
    def name(self) -> str:
        """The split, and the image's file where the data set names it (`mvlm data folder` does), else the id."""
        name = str(self.metadata.get("file") or self.id)
        return f"{self.split}/{name}" if self.split else name


@dataclass
class SearchIndex:
    """An opened search index: searches, additions and removals. `create_index` and `open_index` return one."""

    location: str
    about: dict[str, Any]
    _database: Any

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Kind, path and splits of each embedded collection, in the order of their numbers."""
        return self.about["sources"]

    def check_model(self, sha256: str, what: str) -> None:
        """Raise RunError unless the index is of the model with the hash `sha256`: vectors of others do not compare.

        what: plural noun of what comes from that model, for the error.
        """
        if sha256 != self.about["model"]:
            raise RunError(
                f"{self.location}: wanted {what} of the model {self.about['model'][:12]}... of this index, found "
                f"{sha256[:12]}...; use that model ({self.about['checkpoint'] or 'unnamed'}) or make another index"
            )

    def count(self, kind: str) -> int:
        """Number of rows of the table `images` or `texts`."""
        return self._table(kind).count_rows()

    def add(self, embeddings: Path) -> dict[str, int]:
        """Add a folder of embeddings. Returns the numbers of images and texts in it, by kind.

        Rows of the same collection, split, row and id are replaced. Rows of the added splits that the embeddings no
        longer have are removed. Processes of this machine add one after another.

        NOTE: machines that share an object store must not add at once. Two collections could get one number, and
        answers would show images of the wrong one.
        """
        description = read_description(embeddings)
        self.check_model(description["model"], "embeddings")
        if description["format_version"] < self.about["format_version"]:
            raise RunError(f"{embeddings}: wanted embeddings with hashes of images, found none; embed them again")
        kinds = kinds_in(embeddings, description)
        whole = [field.name for field in self._table("images").schema if field.type == TYPES["int"]]
        if narrow := [name for name in whole if "fraction" in kinds.get(name, ())]:
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
                for batch in _batches(embeddings, kind, description, table.schema, number):
                    merge = table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
                    merge.execute(pa.Table.from_batches([batch]))
                    keys.update(batch["key"].to_pylist())
                _remove_others(table, f"source = {number} and split in ({_listed(splits)})", keys)
                table.optimize()
        return {kind: description[kind] for kind in KINDS}

    def reload(self) -> None:
        """Read the index's description again, so that collections that another process has added are known."""
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
            with _filter_errors(where, table.schema):
                table.count_rows(where)
        removed = {}
        with _turn_at(self.location):
            for kind, table in tables.items():
                with _filter_errors(where, table.schema):
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
        table = self._table(kind)
        columns = [
            name for name in ("id", "split", "source", "row", "image", "metadata", "text") if name in table.schema.names
        ]
        top = min(top, max(1, table.count_rows()))  # the engine takes no number above 2^63
        query = table.search(vector, vector_column_name="vector").distance_type("dot").limit(top + MARGIN)
        if cells := self.about["partitions"].get(kind, 0):
            # Where few rows pass a filter, these cells may hold too few answers: then more are read, without a maximum.
            probed = max(min(cells, LEAST_PROBED), round(PROBED * cells))
            query = query.minimum_nprobes(probed).maximum_nprobes(0).refine_factor(REFINED)
        if where is not None:
            query = query.where(where)
        with _filter_errors(where, table.schema):
            rows = query.select([*columns, "vector", "_distance"]).to_arrow().to_pylist()
        hits = [self._hit(row, vector) for row in rows]
        return sorted(hits, key=lambda hit: (-hit.similarity, hit.source, hit.split, hit.row))[:top]

    def _hit(self, row: dict[str, Any], vector: NDArray[np.float32]) -> Hit:
        """Make an answer from a row of the index, with its float64 similarity to the query's vector float32 (E,).

        The row is compared with its schema: an index may come from others.
        """
        try:
            metadata = parse_json(row["metadata"] or "null")
        except ValueError:
            metadata = None
        check({**row, "metadata": metadata}, IndexRow, self.location, "the rows of an index")
        assert isinstance(metadata, dict)
        if row["source"] >= len(self.sources):
            self.reload()  # another process has added to it
            if row["source"] >= len(self.sources):
                raise RunError(f"{self.location}: wanted a row of its sources, found source {row['source']}")
        similarity = float(np.asarray(row["vector"], np.float64) @ vector.astype(np.float64))
        text = row.get("text") or ""
        return Hit(row["id"], row["split"], row["source"], row["row"], row.get("image", ""), text, similarity, metadata)

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
            table = self._database.open_table(kind)
            found = table.schema
        except BaseException as error:
            refuse_of(error, self.location, f"the {kind} of the index")
        for field in (*OWN_COLUMNS, *schema_of(kind, self.about["width"], self.about["format_version"])):
            if field.name not in found.names or found.field(field.name).type != field.type:
                raise RunError(
                    f"{self.location}: wanted a column {field.name} of {field.type} in its {kind}, found another or "
                    "none; make it again"
                )
        return table


def _turn_at(location: str) -> contextlib.AbstractContextManager[Any]:
    """Context that only one process at a time can enter. An index in an object store has no lock."""
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
    _check_place(location)
    description, local = read_description(embeddings), Path(location)
    if "://" not in location and not local.is_file():
        local.mkdir(parents=True, exist_ok=True)
    with _turn_at(location):
        database, exists = _connect(location)
        if exists:
            raise RunError(
                f"{location}: wanted a new place for the index, found an index; add to it, or choose another one"
            )
        ours = {LOCK, *(f"{kind}.lance" for kind in KINDS)}
        if "://" not in location and {path.name for path in local.iterdir()} - ours:
            raise RunError(f"{location}: wanted a new or empty folder for the index, found other files; choose another")
        about = {name: description[name] for name in ("format_version", "model", "checkpoint", "width")}
        about |= {"sources": [description["source"]], "partitions": {}}
        # Both tables have a column for each field of the images' metadata, so that a filter means the same in both.
        fields = fields_of(kinds_in(embeddings, description))
        for kind in KINDS:
            rows = description[kind]
            schema = pa.schema([*OWN_COLUMNS, *schema_of(kind, about["width"], about["format_version"]), *fields])
            # The engine takes no empty iterator.
            batches = _batches(embeddings, kind, description, schema, 0) if rows else None
            table = database.create_table(kind, batches, schema=schema, mode="overwrite")
            if method == "ivf" or (method == "auto" and rows >= APPROXIMATE_FROM):
                about["partitions"][kind] = _build_inverted_file(table, rows, about["width"])
        write_about(database, about)  # last: an index without it is unfinished
    return SearchIndex(location, about, database)


def _build_inverted_file(table: Any, rows: int, width: int) -> int:
    """Build an inverted file over a table's vectors. Returns its number of cells, the square root of `rows`."""
    from lancedb.index import IvfPq

    cells = max(1, round(rows**0.5))
    pieces = max(piece for piece in range(1, max(2, width // 4 + 1)) if width % piece == 0)
    table.create_index("vector", config=IvfPq(distance_type="dot", num_partitions=cells, num_sub_vectors=pieces))
    return cells


def open_index(location: str) -> SearchIndex:
    """Open an index. RunError if there is none, or one of another version."""
    _check_place(location)
    here = "://" in location or Path(location).is_dir()  # the engine would make the folder
    database, exists = _connect(location) if here else (None, False)
    if not exists:
        raise RunError(f"{location}: wanted an index that `mvlm search index` made, found none; check the path")
    return SearchIndex(location, read_about(database, location), database)


def _check_place(location: str) -> None:
    """Raise RunError unless `location` is a URL of an object store without credentials, or a local folder.

    A folder may have no link that leads out of it.
    """
    scheme, sign, rest = location.partition("://")
    if sign and (scheme not in STORES or "@" in rest.split("/")[0] or len(rest.split("/")[0]) < 3):
        raise RunError(
            f"{scheme}://...: wanted a folder for an index, or a URL such as s3://BUCKET/NAME ({', '.join(STORES)}) "
            "without a password, found another one; choose another place"
        )
    if not sign and Path(location).is_dir():
        with run_errors():
            check_links(Path(location))


def _connect(location: str) -> tuple[Any, bool]:
    """A database in a folder or an object store, and whether it is an index. ConfigError without lancedb."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # read when lancedb is imported
    try:
        import lancedb
    except ImportError:
        raise ConfigError(
            "search: wanted the package lancedb, which is not installed; pip install 'mvlm[search]'"
        ) from None
    try:
        database = lancedb.connect(location)
        return database, "about" in database.list_tables(limit=100).tables
    except Exception as error:  # the engine raises bare RuntimeError and OSError
        raise RunError(f"{location}: wanted a folder or a URL for an index, could not use it: {_line(error)}") from None


def read_about(database: Any, location: str) -> dict[str, Any]:
    """Description of an index. RunError if it is damaged, or of another version."""
    try:
        table = database.open_table("about")
        if table.count_rows() != 1:
            raise ValueError(f"{table.count_rows()} rows")
        about = parse_json(table.to_arrow()["json"][0].as_py())
    except BaseException as error:  # the engine raises errors of many types, and panics
        refuse_of(error, location, "the description of an index")
    check(about, IndexAbout, location, "the description of an index")
    if about["format_version"] not in READABLE:
        raise RunError(
            f"{location}: wanted format version {FORMAT_VERSION}, found {about['format_version']}; embed and index "
            "again"
        )
    return about


def refuse_of(error: BaseException, location: str, wanted: str) -> NoReturn:
    """Raise a RunError in place of an error of LanceDB, which may be a panic of Rust.

    Other errors that are no `Exception`, such as KeyboardInterrupt, are raised as they are.

    wanted: noun phrase for what could not be read.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    raise RunError(f"{location}: wanted {wanted}, could not be read: {_line(error)}; make it again") from None


def write_about(database: Any, about: dict[str, Any]) -> None:
    """Write the description of an index, in place of the one before."""
    database.create_table("about", pa.table({"json": [json.dumps(about)]}), mode="overwrite")


@contextlib.contextmanager
def _filter_errors(where: str | None, schema: pa.Schema) -> Iterator[None]:
    """Turn any error of a search with a filter into a ConfigError that quotes it and lists the columns."""
    try:
        yield
    except Exception as error:
        if where is None:
            raise
        names = ", ".join(name for name in schema.names if name not in ("vector", "metadata"))
        raise ConfigError(
            f"where: wanted an SQL condition on the columns {names}, got {where!r} ({_line(error)}); correct it"
        ) from None


def _line(error: BaseException) -> str:
    """Text of an error as one line, cut to 200 characters."""
    return shown(error)[:200]


def _listed(texts: Iterable[str]) -> str:
    """Quote texts as string literals of SQL, joined by commas."""
    return ", ".join("'" + text.replace("'", "''") + "'" for text in texts)


def _remove_others(table: Any, where: str, keys: set[str]) -> None:
    """Remove the rows that an SQL condition chooses, except those whose column `key` is in `keys`."""
    if (rows := table.count_rows(where)) == len(keys):
        return
    found = table.search().where(where).select(["key"]).limit(rows).to_arrow()["key"].to_pylist()
    gone = [key for key in found if key not in keys]
    for start in range(0, len(gone), BATCH_ROWS):
        table.delete(f"key in ({_listed(gone[start : start + BATCH_ROWS])})")


def _batches(
    embeddings: Path, kind: str, description: dict[str, Any], schema: pa.Schema, source: int
) -> Iterator[pa.RecordBatch]:
    """Yield the images or texts of an embedding folder with the columns of an index's table, in record batches."""
    given = set(schema_of(kind, description["width"], description["format_version"]).names)
    extra = [field for field in schema if field.name not in {*given, "key", "source"}]
    for batch in read_batches(embeddings, kind, description):
        columns: dict[str, Any] = {name: batch[name] for name in given}
        keys = zip(*(batch[name].to_pylist() for name in ("row", "split", "id")), strict=True)
        # With the row, because a split may have an id twice.
        columns["key"] = pa.array([f"{source}/{row}/{split}/{id}" for row, split, id in keys])
        columns["source"] = pa.array([source] * len(batch), pa.int32())
        columns |= columns_of(batch["metadata"].to_pylist(), extra)
        yield pa.RecordBatch.from_arrays(
            [columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema
        )


def kinds_in(embeddings: Path, description: dict[str, Any]) -> dict[str, set[str]]:
    """Fields of the metadata of embedded images that can be columns, with the kinds of their values.

    These are the names of Python's types, and "fraction" for a number that a double holds and an int64 does not.
    """
    found: dict[str, set[str]] = {}
    batches = read_batches(embeddings, "images", description, ["metadata"])
    for text in (text for batch in batches for text in batch["metadata"].to_pylist()):
        for name, value in json.loads(text).items():
            # A plain name, that no other column has, nor the engine's (`_distance`).
            plain = re.fullmatch(r"[A-Za-z]\w{0,63}", name, re.ASCII) and name.lower() not in RESERVED
            if plain and isinstance(value, bool | int | float | str):
                number = isinstance(value, int | float)
                fraction = number and _as_int64(value) is None and _as_double(value) is not None
                found.setdefault(name, set()).add("fraction" if fraction else type(value).__name__)
    return found


def fields_of(kinds: dict[str, set[str]]) -> list[pa.Field]:
    """Arrow fields for metadata, sorted by name, from the kinds of each field's values.

    Whole numbers become int64, and double if some are not whole or too large. Booleans become bool. Texts become
    string, as do values of different types.
    """
    found = []
    for name, seen in sorted(kinds.items())[:MAX_COLUMNS]:
        if len(seen) > 1 or seen == {"fraction"}:
            kind = "float" if seen <= {"int", "float", "fraction"} else "str"
        else:
            (kind,) = seen
        found.append(pa.field(name, TYPES[kind]))
    return found


def columns_of(metadata: Sequence[str], fields: Iterable[pa.Field]) -> dict[str, pa.Array]:
    """Make an Arrow column of each field, null where an item lacks it or has a value of another type.

    metadata: metadata of each item, as the text of a JSON object.
    """
    values = [json.loads(text) for text in metadata]
    return {
        field.name: pa.array([_as_type(one.get(field.name), field.type) for one in values], field.type)
        for field in fields
    }


def _as_type(value: Any, wanted: pa.DataType) -> Any:
    if value is None or isinstance(value, list | dict):
        return None
    if pa.types.is_string(wanted):
        return value if isinstance(value, str) else json.dumps(value)
    if pa.types.is_boolean(wanted):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if pa.types.is_floating(wanted):
        return _as_double(value)
    return _as_int64(value)


def _as_double(value: float) -> float | None:
    """A number as double, None if it is too large or not a number."""
    return float(value) if abs(value) < 2**1023 else None


def _as_int64(value: float) -> int | None:
    """A number as int64, None if it is not whole or too large. 2.0 is whole."""
    return int(value) if value == value // 1 and -(2**63) <= value < 2**63 else None
