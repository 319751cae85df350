"""Embeddings of a whole collection, as Parquet files of vectors with ids and metadata (docs/guides/search.md).

    OUT/images.parquet      id, split, row, image, metadata, vector
    OUT/texts.parquet       id, split, row, image, metadata, text, vector
    OUT/rejected.jsonl      images that could not be used, one JSON object per line
    OUT/embedding.json      written last: model, source, counts
    OUT/parts/              while the work is not finished: finished parts, and plan.json

The work is made in parts: resumable, and shared by the ranks that torchrun started. Parts are the same whatever the
number of ranks and however often the work was interrupted, and so are the files. A file is written aside, forced to the
disk and renamed, so a file with its final name is complete.

Shape legend: n rows, E contrastive width.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mvlm.device import chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.files import LOCK, lock_folder
from mvlm.inference.encode import BATCH, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.progress import WorkProgress
from mvlm.schemas import Embedding, FinishedEmbedding
from mvlm.search.collection import Collection, FolderCollection, Item
from mvlm.untrusted import read_json, run_errors
from mvlm_dataloading.files import replaced, write_file, write_json
from mvlm_dataloading.untrusted import check_links, open_parquet, parse_json

log = logging.getLogger(__name__)
FORMAT_VERSION = 2
"""Format of embedding.json and of an index. Version 2 added the column `image`, the SHA-256 of the encoded image."""
READABLE = (1, 2)
KINDS = ("images", "texts")
BATCH_ROWS = 8192
PART = 16 * BATCH
"""Items of a part: a kill loses at most one part of each rank. Captions are in batches that begin anew with a part."""
# A dictionary of the numbers of vectors, which do not repeat, would take five times as long and a third more room.
PARQUET = {"compression": "zstd", "use_dictionary": ["id", "split", "metadata", "text"]}


class EmbeddingFolder:
    """Paths of the files of one embedding. Nothing is read or made."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, path / "parts"
        self.spec = self.parts / "plan.json"
        self.description, self.rejected = path / "embedding.json", path / "rejected.jsonl"

    def vectors(self, kind: str) -> Path:
        """Parquet file of all images or texts."""
        return self.path / f"{kind}.parquet"

    def part(self, kind: str, number: int) -> Path:
        """Parquet file of one part."""
        return self.parts / f"{kind}-{number:07d}.parquet"


def embed(model: TrainedModel, collection: Collection, out: Path, world: World, checkpoint: str = "") -> dict[str, Any]:
    """Embed all images and captions of a collection. Returns the content of embedding.json, on every rank.

    An unfinished embedding of the same model and collection is continued, a finished one is left as it is.

    Args:
        out: folder of the embedding, new, empty or unfinished.
        checkpoint: name of the model, for embedding.json.

    Raises:
        RunError: `out` holds something else, or vectors of another device or precision; another process writes there;
            or ranks have different models or data, or compute differently.
        DataError: an image of a data set cannot be decoded.
    """
    folder = EmbeddingFolder(out)
    # What "auto" stands for may differ from machine to machine.
    arithmetic = {"device": model.device.type, "precision": chosen_precision(model.device, model.precision)}
    check_same(world, {"out": str(out), "model": model.sha256, "data": collection.fingerprint, **arithmetic})
    spec = {
        "format_version": FORMAT_VERSION,
        "model": model.sha256,
        "width": model.network.config.itc_width,
        **arithmetic,
        "source": collection.source,
        "fingerprint": collection.fingerprint,
        "items": len(collection),
        "part": PART,
    }
    settled = ("device", "precision") if model.precision == "auto" else ("device",)
    with run_on_all_ranks(world, lambda: _lock(folder) if world.first else contextlib.nullcontext()):
        run_on_all_ranks(world, lambda: _begin(folder, spec, settled) if world.first else None)
        if not folder.description.is_file():
            run_on_all_ranks(world, lambda: _embed_parts(model, collection, folder, world))
            run_on_all_ranks(world, lambda: _finish(folder, collection, spec, checkpoint) if world.first else None)
        return read_description(out)


def _lock(folder: EmbeddingFolder) -> contextlib.AbstractContextManager[object]:
    """Lock the folder. RunError if it is not one of an embedding, or if another process has it."""
    if folder.path.is_dir():
        with run_errors():
            check_links(folder.path)
    if folder.path.exists() and not (folder.spec.is_file() or folder.description.is_file()):
        if not folder.path.is_dir():
            raise RunError(f"{folder.path}: wanted a folder for the embeddings, found a file; choose another one")
        foreign = {path.name for path in folder.path.iterdir()} - {LOCK, folder.parts.name}
        foreign |= {path.name for path in folder.parts.glob("*") if not _PART.fullmatch(path.name)}
        if foreign:
            raise RunError(f"{folder.path}: wanted a new or empty folder, found {min(foreign)}; choose another one")
    return lock_folder(folder.path)


_PART = re.compile(r"\.?((images|texts)-\d+\.parquet|plan\.json)(\..*)?")
"""Names of the files in the folder of parts, finished or not."""


def _begin(folder: EmbeddingFolder, spec: dict[str, Any], settled: Sequence[str]) -> None:
    """Start or continue an embedding in a locked folder. RunError if it holds another embedding.

    A folder without finished parts gets the specification. Files of killed processes are removed.

    Args:
        spec: everything that the vectors depend on, as JSON.
        settled: keys of `spec` in which a finished embedding may differ from it.
    """
    _remove_leftovers(folder)
    finished = folder.description.is_file()
    if not finished and not (folder.spec.is_file() and any(folder.parts.glob("*.parquet"))):
        write_json(folder.spec, spec)
        return
    recorded = _read_versioned(folder.description if finished else folder.spec)
    free = settled if finished else ()
    differing = [name for name, value in spec.items() if recorded.get(name) != value and name not in free]
    if differing:
        listed = "; ".join(f"{name}: found {recorded.get(name)}, wanted {spec[name]}" for name in differing)
        hint = ""
        if {"device", "precision"}.issuperset(
            differing
        ) and "device" in recorded:  # which earlier versions did not write
            hint = f"give --device {recorded['device']} --precision {recorded['precision']}, "
        raise RunError(
            f"{folder.path}: wanted this embedding or an empty folder, found another one ({listed}); "
            f"{hint}choose another folder or remove this one"
        )


def _remove_leftovers(folder: EmbeddingFolder) -> None:
    """Remove files that a killed process was writing."""
    for pattern in (".*.parquet.*", "parts/.*.parquet.*", ".embedding.json.*", ".rejected.jsonl.*"):
        for file in folder.path.glob(pattern):
            file.unlink()
    if folder.description.is_file():
        shutil.rmtree(folder.parts, ignore_errors=True)


def _numbers(items: int) -> range:
    """Numbers, from 0, of the parts in which a collection of so many items is embedded."""
    return range(-(-items // PART))


def _embed_parts(model: TrainedModel, collection: Collection, folder: EmbeddingFolder, world: World) -> None:
    """Embed this rank's parts of a collection, those whose files are not there yet, and write their files."""
    done, numbers = 0, _numbers(len(collection))[world.rank :: world.size]
    with WorkProgress("images") if world.first else contextlib.nullcontext() as progress:
        for position, number in enumerate(numbers, 1):
            paths = [folder.part(kind, number) for kind in KINDS]
            if not all(path.is_file() for path in paths):
                start, stop = number * PART, min((number + 1) * PART, len(collection))
                for path, table in zip(paths, _embed_part(model, collection, start, stop), strict=True):
                    write_table(path, table)
                done += stop - start
            if progress is not None:
                progress.show(position, len(numbers), done)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole, as one row group."""
    with replaced(path) as aside:
        pq.write_table(table, aside, row_group_size=max(1, len(table)), **PARQUET)


def _embed_part(model: TrainedModel, collection: Collection, start: int, stop: int) -> tuple[pa.Table, pa.Table]:
    """Tables of the images and the texts of the items `start` to `stop` - 1."""
    items, vectors = [], []
    for batch, pixels in collection.batches(start, stop, model):
        items += batch
        vectors.append(image_features(model.network, pixels, model.precision).embedding.cpu())
    texts = [(f"{item.id}#{number}", item, text) for item in items for number, text in enumerate(item.captions)]
    embedded = model.text_embeddings([text for _, _, text in texts], truncate=True, clean=False)
    width = model.network.config.itc_width
    return (
        _table("images", [(item.id, item, "") for item in items], vectors, width),
        _table("texts", texts, list(embedded), width),
    )


def schema_of(kind: str, width: int, version: int = FORMAT_VERSION) -> pa.Schema:
    """Columns of the images or the texts, with vectors as fixed-size lists of float32 (E,)."""
    columns = {
        "id": pa.string(), "split": pa.string(), "row": pa.int64(), "image": pa.string(), "metadata": pa.string(),
    }  # fmt: skip
    if version == 1:
        del columns["image"]
    text = {"text": pa.string()} if kind == "texts" else {}
    return pa.schema({**columns, **text, "vector": pa.list_(pa.float32(), width)})


def _table(kind: str, rows: Sequence[tuple[str, Item, str]], vectors: list[torch.Tensor], width: int) -> pa.Table:
    """Make an Arrow table of embeddings.

    Args:
        kind: images or texts.
        rows: (id of the row, its image's item, its text) of each row.
        vectors: batches float32 (n, E), together a vector for each row.
        width: E.
    """
    numbers = torch.cat(vectors).numpy() if vectors else np.empty((0, width), np.float32)
    # JSON may hold half a letter of Unicode, which a file in UTF-8 may not: it becomes "?".
    metadata = [
        json.dumps(item.metadata, ensure_ascii=False).encode("utf-8", "replace").decode() for _, item, _ in rows
    ]
    columns: dict[str, Any] = {
        "id": [id for id, _, _ in rows],
        "split": [item.split for _, item, _ in rows],
        "row": [item.row for _, item, _ in rows],
        "image": [item.sha256 for _, item, _ in rows],
        "metadata": metadata,
        "text": [text for _, _, text in rows],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(numbers).reshape(-1)), width),
    }
    schema = schema_of(kind, width)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def join_parts(folder: EmbeddingFolder, kind: str, items: int, width: int) -> int:
    """Write the parts of an embedding as one Parquet file, one part in memory at a time. Returns the number of rows.

    Args:
        kind: images or texts.
        items: number of items in the collection.
        width: width of the vectors.
    """
    rows = 0
    with (
        replaced(folder.vectors(kind)) as aside,
        pq.ParquetWriter(aside, schema_of(kind, width), **PARQUET) as writer,
    ):
        for number in _numbers(items):
            table = pq.read_table(folder.part(kind, number), memory_map=True)
            rows += len(table)
            if len(table):
                writer.write_table(table, row_group_size=len(table))
    return rows


def _finish(folder: EmbeddingFolder, collection: Collection, spec: dict[str, Any], checkpoint: str) -> None:
    """Join the parts, list the images that were left out, and write embedding.json."""
    counts = {kind: join_parts(folder, kind, len(collection), spec["width"]) for kind in KINDS}
    rejected = []
    if counts["images"] < len(collection):
        assert isinstance(collection, FolderCollection)  # images of a data set were decoded when it was built
        rows = pq.read_table(folder.vectors("images"), columns=["row"])["row"].to_pylist()
        missing = sorted(set(range(len(collection))).difference(rows))
        rejected = [{"id": collection.id(i), "reason": collection.why_left_out(i)} for i in missing]
        log.warning("%d images could not be used; %s says why", len(rejected), folder.rejected)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    write_file(folder.rejected, lines.encode("utf-8", "backslashreplace"))
    if not counts["images"]:
        raise RunError(f"{folder.path}: wanted images to embed, found none that can be read; see {folder.rejected}")
    write_json(folder.description, {**spec, "checkpoint": checkpoint, "rejected": len(rejected), **counts})
    _remove_leftovers(folder)


def read_description(path: Path) -> dict[str, Any]:
    """The description of a finished embedding. RunError if the folder holds none, or one of another version."""
    folder = EmbeddingFolder(path)
    if not folder.description.exists():
        unfinished = folder.spec.is_file()
        found = "one that is not finished" if unfinished else "none"
        hint = "run the same `mvlm embed` again" if unfinished else "check the path, or run `mvlm embed`"
        raise RunError(f"{path}: wanted a folder that `mvlm embed` wrote, found {found}; {hint}")
    return _read_versioned(folder.description, FinishedEmbedding)


def _read_versioned(file: Path, schema: Any = Embedding) -> dict[str, Any]:
    """Read embedding.json or plan.json of an embedding. RunError if it has another format version or is damaged."""
    value = read_json(file, "settings", "the description of an embedding", schema)
    if value["format_version"] not in READABLE:
        raise RunError(
            f"{file}: wanted format version {FORMAT_VERSION}, found {value['format_version']}; make it again"
        )
    return value


def read_batches(
    folder: Path, kind: str, description: dict[str, Any], columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a finished embedding in record batches, checked: columns, types, widths and finite vectors.

    Args:
        kind: images or texts.
        description: of the embedding, as `read_description` returns it.
        columns: names of the columns to read. Default: all.

    Raises:
        RunError: the file is none that `mvlm embed` wrote.
    """
    file, rows = EmbeddingFolder(folder).vectors(kind), description[kind]
    schema = schema_of(kind, description["width"], description["format_version"])

    def refuse(found: str) -> NoReturn:
        raise RunError(f"{file}: wanted the {kind} of an embedding, found {found}; make it again")

    try:
        with run_errors():
            opened = open_parquet(file, within=folder)
        if not opened.schema_arrow.equals(schema):
            refuse("other columns")
        if opened.metadata.num_rows != rows:
            refuse(f"{opened.metadata.num_rows} rows where {rows} were written")
        for batch in opened.iter_batches(BATCH_ROWS, columns=columns):
            batch.validate(full=True)  # texts that are not UTF-8
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if found := _fault(name, column):
                    refuse(found)
            yield batch
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        refuse(" ".join(str(error).split())[:200])


_SHA256 = re.compile("[0-9a-f]{64}")


def _fault(name: str, column: pa.Array) -> str | None:
    """Reason why values of a column of an embedding cannot be used; None if they can."""
    values = column.flatten() if name == "vector" else column
    if column.null_count or values.null_count:
        return f"rows without {name}"
    if name == "vector":
        return None if np.isfinite(values.to_numpy()).all() else "vectors with NaN or infinity"
    if name == "row":
        return "negative rows" if len(column) and min(column.to_pylist()) < 0 else None
    if name == "metadata":
        return None if all(map(_is_object, column.to_pylist())) else "metadata that are no JSON objects"
    if name == "image":
        return None if all(map(_SHA256.fullmatch, column.to_pylist())) else "images without a SHA-256"
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False
