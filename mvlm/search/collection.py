"""Collections to embed: a data set, or a folder of images. Items have a fixed order, and are read in parts.

Shape legend: B batch, S image side.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.inference.images import LIMITS, load_image, one_ahead
from mvlm.inference.trained_model import TrainedModel
from mvlm.untrusted import run_errors
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.build.image_check import EXTENSIONS
from mvlm_dataloading.captions import clean_line
from mvlm_dataloading.dataset.dataset import parse_captions, parse_metadata
from mvlm_dataloading.dataset.description import read_description
from mvlm_dataloading.dataset.remote_cache import open_remote_cache
from mvlm_dataloading.files import sha256
from mvlm_dataloading.images.decode import read_image_file
from mvlm_dataloading.images.limits import ImageRefusedError
from mvlm_dataloading.loader.segment import RawBatch
from mvlm_dataloading.sources.files import files_under
from mvlm_dataloading.sources.folder import LISTED
from mvlm_dataloading.untrusted import LIMITS as LIMITS_OF_FILES
from mvlm_dataloading.untrusted import check_links, parse_json, read_regular, resolve_inside
from mvlm_dataloading.urls import is_remote, normal_url

STORED = replace(LIMITS, kinds=tuple(EXTENSIONS))
"""Limits of an image in a folder that is embedded: only formats that a data set may store are decoded."""


class Item(NamedTuple):
    """One image of a collection with its captions and metadata, and where it comes from."""

    id: str
    """Identifier, unique in the collection: the key in the split, or the path in the folder."""
    split: str
    """Split of the item; empty in a folder."""
    row: int
    """Position in the split or in the folder."""
    captions: list[str]
    metadata: dict[str, Any]
    sha256: str
    """SHA-256 of the encoded image, which shows later whether the file still holds this image."""


@dataclass
class DataCollection:
    """All samples of one or several splits of a data set, in an order that never changes."""

    folder: Path | str
    splits: list[Dataset]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    @property
    def source(self) -> dict[str, Any]:
        """Kind, path and splits of the collection as plain JSON, from which it can be opened again."""
        return {"kind": "data", "path": str(self.folder), "splits": [split.split for split in self.splits]}

    @property
    def fingerprint(self) -> str:
        """Hash of the items and their order."""
        return " ".join(split.fingerprint for split in self.splits)

    def image_bytes(self, id: str, split: str, row: int) -> bytes:
        """The encoded image of an item."""
        found = next((one for one in self.splits if one.split == split), None)
        if found is None or row >= len(found) or found.keys[row] != id:
            raise RunError(
                f"{self.folder}: wanted the image {split}/{id} that was embedded, found other data; embed and index "
                "them again"
            )
        return found.image_bytes(row)

    def batches(self, start: int, stop: int, model: TrainedModel) -> Iterator[tuple[list[Item], Tensor]]:
        """Items `start` to `stop` - 1 in batches, with their images uint8 (B, 3, S, S)."""
        for split in self.splits:
            first, last = max(0, start), min(len(split), stop)
            if first < last:
                part = split.rows(first, last)
                for raw in eval_loader(part, model.network, model.tokenizer).raw_batches():
                    yield [_item_of(part, first, raw, i) for i in range(len(raw.ids))], raw.images
            start, stop = start - len(split), stop - len(split)


@dataclass
class FolderCollection:
    """All images under a folder, with the methods of a `DataCollection`. Images that are unusable are in no batch.

    Captions of `a/b.jpg` are the lines of `a/b.txt`, if there is one; its metadata is the object in `a/b.json`.
    """

    folder: Path
    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "folder", "path": str(self.folder)}

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            found = path.stat() if path.is_file() else None  # None: a link that leads nowhere
            state = (found.st_size, found.st_mtime_ns) if found else (-1, 0)  # an edited image may keep its size
            digest.update(f"{path.relative_to(self.folder)}\0{state}\0".encode(errors="surrogateescape"))
            for suffix in (".txt", ".json"):
                beside = path.with_suffix(suffix)
                if (
                    beside.is_file() and beside.stat().st_size <= LIMITS_OF_FILES["caption"]
                ):  # a larger one is used by nobody
                    digest.update(bytes.fromhex(sha256(beside)))
        return digest.hexdigest()

    def item(self, i: int, content: bytes) -> Item:
        """Item i, whose encoded image is given. RunError if a file beside it cannot be used."""
        path = self.paths[i]
        captions = [line for line in map(clean_line, self._sidecar(path, ".txt").split("\n")) if line]
        try:
            metadata = parse_json(self._sidecar(path, ".json") or "{}", half_characters=True)
        except ValueError:
            metadata = None
        if not isinstance(metadata, dict):
            raise RunError(
                f"{path.with_suffix('.json')}: wanted a JSON object, found something else; mend or remove it"
            )
        return Item(self.id(i), "", i, captions, metadata, hashlib.sha256(content).hexdigest())

    def _sidecar(self, path: Path, suffix: str) -> str:
        """Content of the text file that has an image's path with another suffix; empty if there is none."""
        file = path.with_suffix(suffix)
        try:
            with run_errors():
                return read_regular(file, "caption", within=self.folder).decode("utf-8-sig")
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise RunError(f"{file}: wanted UTF-8, found other bytes; mend or remove it") from None

    def image_bytes(self, id: str, split: str, row: int) -> bytes:
        with run_errors():
            path = resolve_inside(self.folder / id, self.folder)
        return read_image_file(path, LIMITS.max_bytes)

    def batches(self, start: int, stop: int, model: TrainedModel) -> Iterator[tuple[list[Item], Tensor]]:
        def loaded() -> Iterator[tuple[list[Item], Tensor]]:
            for first in range(start, stop, BATCH):
                items, images = [], []
                for i in range(first, min(first + BATCH, stop)):
                    with contextlib.suppress(RunError):  # `why_left_out` says why
                        item, image = self._load(i, model.network.config.image_size)
                        items.append(item)
                        images.append(image)
                if items:
                    yield items, torch.stack(images)

        return one_ahead(loaded())

    def id(self, i: int) -> str:
        """Id of item i, which may be unusable."""
        return str(self.paths[i].relative_to(self.folder))

    def why_left_out(self, i: int) -> str:
        """Reason why item i is in no batch."""
        try:
            self._load(i, 1)
        except RunError as error:
            return str(error)
        return f"{self.paths[i]}: could not be read when its part was embedded, can be read now; embed again"

    def _load(self, i: int, side: int) -> tuple[Item, Tensor]:
        """Item i and its pixels uint8 (3, S, S), S = `side`.

        RunError if the image or a file with its captions or metadata cannot be read, or if its name cannot be an id.
        """
        try:
            str(self.paths[i]).encode()
        except UnicodeEncodeError:
            raise RunError(f"{self.paths[i]}: wanted a file name in UTF-8, found other bytes; rename it") from None
        try:
            content = read_image_file(self.paths[i], STORED.max_bytes)
        except ImageRefusedError as refused:
            raise RunError(f"{self.paths[i]}: {refused}") from None
        return self.item(i, content), load_image(content, side, str(self.paths[i]), STORED)


Collection = DataCollection | FolderCollection


def _item_of(part: Dataset, first: int, raw: RawBatch, i: int) -> Item:
    """Describe sample i of a raw batch as an item of a collection.

    part: rows of a split from row `first` on, from which the batch was read.
    """
    number = int(raw.ids[i])
    where = partial(part.where, number)
    captions, metadata = parse_captions(raw.texts[i], where), parse_metadata(raw.metadata[i], where)
    digest = hashlib.sha256(part.image_bytes(number)).hexdigest()
    return Item(part.keys[number], part.split, first + number, captions, metadata, digest)


def open_collection(path: Path | str, splits: list[str] | None = None) -> Collection:
    """Open a data set, by default with all of its splits, or a folder of images.

    Raises:
        RunError: there is no such folder, or it holds no images.
        DataError: the data set is broken, or has no such split.
    """
    if is_remote(path) or (Path(path) / "dataset.json").is_file():
        folder = open_remote_cache(str(path)).folder if is_remote(path) else Path(path)
        names = dict.fromkeys(splits or read_description(folder)["splits"])  # each once
        place = normal_url(path) if is_remote(path) else Path(path).resolve()
        return DataCollection(place, [open_dataset(path, name) for name in names])
    check_folder(Path(path), "a data set or a folder of images")
    if splits:
        raise RunError(f"{path}: wanted a data set, which has splits, found a folder of images; leave out the splits")
    folder = Path(path).resolve()
    with run_errors():
        check_links(folder)
    paths = [file for file in files_under(folder) if file.suffix.lower() in LISTED]
    if not paths:
        raise RunError(f"{path}: wanted a data set or a folder of images, found no image in it; check the path")
    return FolderCollection(folder, paths)
