"""One split of a data set: location of its samples, and random access to them."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.randomness import text_hash

from .dali_index import KINDS, Component, DaliIndex, Int64
from .remote_cache import RemoteCache


class Keys:
    """Keys of the samples, read from the indices on request."""

    def __init__(self, indices: list[DaliIndex], shard: Int64, first: Int64):
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
    """One split of a data folder, made by `open_dataset`. A sample's id is its position, 0 to len - 1.

    Shape legend: n samples.
    """

    folder: Path
    split: str
    tars: list[Path]
    shard: Int64
    """(n,), ascending: position of each sample's shard in `tars`."""
    first: Int64
    """Id of the first sample of each shard."""
    indices: list[DaliIndex]
    """One per shard."""
    keys: Keys
    image: Component
    text: Component
    meta: Component
    tokens: Component
    description: dict[str, Any]
    """Content of `dataset.json`."""
    fingerprint: str
    """Hash of the split's samples and their order."""
    remote: RemoteCache | None = None
    """The cache of a remote data set, which fetches its shards. `tars` are then paths in the cache."""

    def __len__(self) -> int:
        return len(self.shard)

    def head(self, count: int) -> "Dataset":
        """The first `count` samples as a data set, or all of them if there are fewer."""
        return self if count >= len(self) else self.rows(0, count)

    def rows(self, start: int, stop: int) -> "Dataset":
        """The samples `start` to `stop` - 1 as a data set, in which their ids begin at 0."""
        components = {
            kind: Component(getattr(self, kind).offset[start:stop], getattr(self, kind).size[start:stop])
            for kind in KINDS
        }
        shard, first = self.shard[start:stop], self.first - start
        return replace(
            self,
            shard=shard,
            first=first,
            keys=Keys(self.indices, shard, first),
            fingerprint=f"{self.fingerprint}:{stop}" if start == 0 else f"{self.fingerprint}:{start}:{stop}",
            **components,
        )

    @property
    def splits(self) -> list[str]:
        """Names of all splits of the data set, this one included."""
        return list(self.description["splits"])

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the `tokenizer.json` that belongs to the data, or None."""
        return self.description.get("tokenizer")

    def captions(self, i: int) -> list[str]:
        """All captions of sample i, the main one first."""
        return parse_captions(self._read(self.text, i), lambda: self.where(i))

    def metadata(self, i: int) -> dict[str, Any]:
        """Content of `<key>.json`; empty for a sample without metadata."""
        return parse_metadata(self._read(self.meta, i), lambda: self.where(i))

    def image_bytes(self, i: int) -> bytes:
        """The encoded image."""
        return self._read(self.image, i)

    def image_id(self, i: int) -> int:
        """Id of the sample's image, int64, equal for samples of the same image. The values of `Batch.image_id`."""
        return image_identity(self.metadata(i), lambda: self.image_bytes(i))

    def where(self, i: int) -> str:
        """Location of sample i for messages: tar, offset and key."""
        return f"{self.tars[self.shard[i]]} offset {self.image.offset[i]} key {self.keys[i]}"

    def index_line(self, i: int) -> bytes:
        """Sample i's line of its index."""
        return self.indices[self.shard[i]].line(i - self.first[self.shard[i]])

    def _read(self, component: Component, i: int) -> bytes:
        if component.size[i] < 0:
            return b""
        shard = int(self.shard[i])
        with self.remote.reading(shard) if self.remote else nullcontext(), self.tars[shard].open("rb") as tar:
            tar.seek(component.offset[i])
            return tar.read(component.size[i])


def parse_captions(text: bytes, where: Callable[[], str]) -> list[str]:
    """The nonblank lines of a `.txt` component. Raises DataError if all lines are blank or the text is not UTF-8."""
    try:
        captions = [line.strip() for line in text.decode().split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{where()}: wanted captions in UTF-8, found other bytes; remove the sample") from None
    if not captions:
        raise DataError(f"{where()}: wanted at least one caption, found none; remove the sample or write its captions")
    return captions


def parse_metadata(text: bytes, where: Callable[[], str]) -> dict[str, Any]:
    """The object of a `.json` component; empty for an empty component. Raises DataError if it is not an object."""
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
    """Id of an image, int64: a hash of the metadata's `image_id`, or of the encoded image if it has none."""
    given = metadata.get("image_id")
    return text_hash(image() if given is None else f"image_id {given}")
