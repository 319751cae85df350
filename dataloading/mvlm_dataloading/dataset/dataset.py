"""One split of a data set: where its samples lie, and random access to single ones."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.randomness import text_hash

from .dali_index import KINDS, Index, Int64, Part
from .remote_cache import Stage


class Keys:
    """The samples' names, read from the indices when they are asked for."""

    def __init__(self, indices: list[Index], shard: Int64, first: Int64):
        self._indices, self._shard, self._first = indices, shard, first

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, i: int) -> str:
        shard = self._shard[i]
        return self._indices[shard].key(i - self._first[shard])

    def tolist(self) -> list[str]:
        return [self[i] for i in range(len(self))]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One split of a data folder. A sample's id is its position, 0 to len - 1. Made by `open_dataset`."""

    folder: Path
    split: str
    tars: list[Path]
    shard: Int64
    """(n,) the position in `tars` of the shard that holds each sample; ascending."""
    first: Int64
    """The id of each shard's first sample."""
    indices: list[Index]
    """Of each shard."""
    keys: Keys
    image: Part
    text: Part
    meta: Part
    tokens: Part
    description: dict[str, Any]
    """`dataset.json`."""
    fingerprint: str
    """Changes when the split's samples do."""
    stage: Stage | None = None
    """Brings the shards here where the data set lies elsewhere; `tars` are then where they come to."""

    def __len__(self) -> int:
        return len(self.shard)

    def head(self, count: int) -> "Dataset":
        """The first `count` samples as a data set; all where there are no more."""
        if count >= len(self):
            return self
        parts = {kind: Part(getattr(self, kind).offset[:count], getattr(self, kind).size[:count]) for kind in KINDS}
        shard = self.shard[:count]
        return replace(
            self,
            shard=shard,
            keys=Keys(self.indices, shard, self.first),
            fingerprint=f"{self.fingerprint}:{count}",
            **parts,
        )

    @property
    def tokenizer_sha256(self) -> str | None:
        """The hash of the `tokenizer.json` that belongs to the data, or None."""
        return self.description.get("tokenizer")

    def captions(self, i: int) -> list[str]:
        """All captions of sample i, the main one first."""
        return parse_captions(self._read(self.text, i), lambda: self.where(i))

    def metadata(self, i: int) -> dict[str, Any]:
        """What `<key>.json` holds; empty if there is none."""
        return parse_metadata(self._read(self.meta, i), lambda: self.where(i))

    def image_bytes(self, i: int) -> bytes:
        """The encoded image."""
        return self._read(self.image, i)

    def image_id(self, i: int) -> int:
        """int64, equal for samples that show the same picture; the loader hands over the same."""
        return image_identity(self.metadata(i), lambda: self.image_bytes(i))

    def where(self, i: int) -> str:
        """Sample i for a message: tar, offset and key."""
        return f"{self.tars[self.shard[i]]} offset {self.image.offset[i]} key {self.keys[i]}"

    def line(self, i: int) -> bytes:
        """Sample i's line of its index."""
        return self.indices[self.shard[i]].line(i - self.first[self.shard[i]])

    def token_bytes(self, i: int) -> bytes:
        """What `<key>.tok` holds; empty if there is none."""
        return self._read(self.tokens, i)

    def caption_bytes(self, i: int) -> bytes:
        """What `<key>.txt` holds."""
        return self._read(self.text, i)

    def metadata_bytes(self, i: int) -> bytes:
        """What `<key>.json` holds; empty if there is none."""
        return self._read(self.meta, i)

    def _read(self, part: Part, i: int) -> bytes:
        if part.size[i] < 0:
            return b""
        shard = int(self.shard[i])
        with self.stage.reading(shard) if self.stage else nullcontext(), self.tars[shard].open("rb") as tar:
            tar.seek(part.offset[i])
            return tar.read(part.size[i])


def parse_captions(text: bytes, where: Callable[[], str]) -> list[str]:
    """The nonblank lines of a `.txt` component. Raises DataError if there are none, or it is not UTF-8."""
    try:
        captions = [line.strip() for line in text.decode().split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{where()}: wanted captions in UTF-8, found other bytes; remove the sample") from None
    if not captions:
        raise DataError(f"{where()}: wanted at least one caption, found none; remove the sample or write its captions")
    return captions


def parse_metadata(text: bytes, where: Callable[[], str]) -> dict[str, Any]:
    """The object in a `.json` component, empty if there is no component. Raises DataError if it is not an object."""
    if not text:
        return {}
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where()}: wanted metadata as JSON, found {error}; remove the sample") from None
    if not isinstance(metadata, dict):
        raise DataError(
            f"{where()}: wanted metadata as a JSON object, found {type(metadata).__name__}; remove the sample"
        )
    return metadata


def image_identity(metadata: dict[str, Any], image: Callable[[], bytes]) -> int:
    """int64, equal for equal pictures: from the metadata's `image_id` if the source gave one, else from the bytes."""
    given = metadata.get("image_id")
    return text_hash(image() if given is None else f"image_id {given}")
