"""Embeddings of a whole collection, in parts: resumable, and shared by the ranks that torchrun started.

Parts are the same whatever the number of ranks and however often the work was interrupted, and so are the files.

Shape legend: n rows, E contrastive width.
"""

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mvlm.device import chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.inference.encode import BATCH, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.progress import WorkProgress
from mvlm.search.collection import Collection
from mvlm.search.embedding_files import (
    FORMAT_VERSION,
    KINDS,
    EmbeddingFolder,
    image_table,
    is_part,
    join_parts,
    read_rows,
    read_versioned,
    remove_leftovers,
    text_table,
    write_lines,
    write_table,
)
from mvlm_dataloading.files import write_json

log = logging.getLogger(__name__)
PART = 16 * BATCH
"""Items of a part: a kill loses at most one part of each rank. Captions are in batches that begin anew with a part."""


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
    own = {"out": str(out), "model": model.sha256, "data": collection.fingerprint, **arithmetic}
    check_same(world, own)
    plan = {
        "format_version": FORMAT_VERSION,
        "model": model.sha256,
        "width": model.network.config.itc_width,
        **arithmetic,
        "source": collection.source,
        "fingerprint": collection.fingerprint,
        "items": len(collection),
        "part": PART,
    }
    numbers = range(-(-len(collection) // PART))
    settled = ("device", "precision") if model.precision == "auto" else ("device",)
    with run_on_all_ranks(world, lambda: _begin(folder, plan, settled) if world.first else contextlib.nullcontext()):
        if folder.description.is_file():
            return read_versioned(folder.description)
        run_on_all_ranks(
            world, lambda: _embed_parts(model, collection, folder, numbers[world.rank :: world.size], world)
        )
        run_on_all_ranks(world, lambda: _finish(folder, collection, plan, checkpoint, numbers) if world.first else None)
        return read_versioned(folder.description)


def _words(arithmetic: dict[str, str]) -> str:
    """The flags of `mvlm embed` that ask for it."""
    return f"--device {arithmetic['device']} --precision {arithmetic['precision']}"


def _begin(folder: EmbeddingFolder, plan: dict[str, Any], settled: Sequence[str]) -> AbstractContextManager[object]:
    """Lock the folder and check what it holds. Returns a context that holds the lock.

    Args:
        settled: names of the plan by which a finished embedding may differ.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path}: wanted a folder for the embeddings, found a file; choose another one")
    known = (folder.lock, folder.parts)
    begun = folder.plan.is_file() or folder.description.is_file()
    if folder.path.is_dir() and not begun and any(path not in known for path in folder.path.iterdir()):
        raise RunError(f"{folder.path}: wanted a new or empty folder, found other files; choose another one")
    if not begun and folder.parts.exists() and any(not is_part(path) for path in folder.parts.iterdir()):
        raise RunError(f"{folder.parts}: wanted parts of an embedding, found other files; choose another folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.lock, timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder.path}: wanted a folder that no other process writes to; wait for it or stop it"
        ) from None
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(held)
        remove_leftovers(folder)
        file = folder.description if folder.description.is_file() else folder.plan
        begun = folder.description.is_file() or any(folder.parts.glob("*.parquet"))
        found = read_versioned(file) if begun and file.is_file() else plan
        free = settled if folder.description.is_file() else ()
        differing = [name for name, value in plan.items() if found.get(name) != value and name not in free]
        if differing:
            listed = "; ".join(f"{name}: found {found.get(name)}, wanted {plan[name]}" for name in differing)
            # Earlier versions wrote no device, and "auto" for what they chose.
            same_work = {"device", "precision"}.issuperset(differing) and "device" in found
            raise RunError(
                f"{folder.path}: wanted this embedding or an empty folder, found another one ({listed}); "
                f"{f'give {_words(found)}, ' if same_work else ''}choose another folder or remove this one"
            )
        if not begun or not file.is_file():
            folder.parts.mkdir(exist_ok=True)
            write_json(folder.plan, plan)
        on_error.pop_all()
    return held


def _embed_parts(
    model: TrainedModel, collection: Collection, folder: EmbeddingFolder, numbers: range, world: World
) -> None:
    """Write the parts `numbers` that are not there yet."""
    done = 0
    with WorkProgress("images") if world.first else contextlib.nullcontext() as progress:
        for position, number in enumerate(numbers, 1):
            paths = [folder.part(kind, number) for kind in KINDS]
            if not all(path.is_file() for path in paths):
                start, stop = number * PART, min((number + 1) * PART, len(collection))
                tables = _embed_part(model, collection, start, stop)
                for path, table in zip(paths, tables, strict=True):
                    write_table(path, table)
                done += stop - start
            if progress is not None:
                progress.show(position, len(numbers), done)


def _embed_part(model: TrainedModel, collection: Collection, start: int, stop: int) -> tuple[Any, Any]:
    """Tables of the images and the texts of the items `start` to `stop` - 1."""
    items, vectors = [], []
    for batch, pixels in collection.batches(start, stop, model):
        items += batch
        vectors.append(image_features(model.network, pixels, model.precision).embedding.cpu())
    captions = [caption for item in items for caption in item.captions]
    texts = model.text_embeddings(captions, truncate=True, clean=False)
    width = model.network.config.itc_width
    return image_table(items, _joined(vectors, width)), text_table(items, _joined(list(texts), width))


def _joined(batches: list[torch.Tensor], width: int) -> NDArray[np.float32]:
    return torch.cat(batches).numpy() if batches else np.empty((0, width), np.float32)


def _finish(
    folder: EmbeddingFolder, collection: Collection, plan: dict[str, Any], checkpoint: str, numbers: range
) -> None:
    """Join the parts, list the images that were left out, and write embedding.json."""
    counts = {kind: join_parts(folder, kind, numbers, plan["width"]) for kind in KINDS}
    rejected = []
    if counts["images"] < len(collection):
        for number in numbers:
            start, stop = number * PART, min((number + 1) * PART, len(collection))
            missing = set(range(start, stop)) - set(read_rows(folder.part("images", number)))
            rejected += [(i, collection.why_left_out(i)) for i in sorted(missing)]
    write_lines(folder.rejected, ({"id": collection.id(i), "reason": reason} for i, reason in rejected))
    if rejected:
        log.warning("%d images could not be used; %s says why", len(rejected), folder.rejected)
    if not counts["images"]:
        raise RunError(f"{folder.path}: wanted images to embed, found none that can be read; see {folder.rejected}")
    write_json(folder.description, {**plan, "checkpoint": checkpoint, "rejected": len(rejected), **counts})
    remove_leftovers(folder)
