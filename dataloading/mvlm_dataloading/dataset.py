"""Reading a data set: checks before anything is loaded, and random access to single samples."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .indices import IMAGE_EXTENSIONS, KINDS, Index, Int64, Part, head_of, parse
from .randomness import text_hash
from .remote import Stage, is_remote, stage_for
from .shards import read_description, shard_files

_SHORT = 8  # bytes; a caption file of at most so many is read when the data set is opened, as it may be blank


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
        if self.stage is not None:
            self.stage.fetch([int(self.shard[i])])
        with self.tars[self.shard[i]].open("rb") as tar:
            tar.seek(part.offset[i])
            return tar.read(part.size[i])


def open_dataset(folder: Path | str, split: str) -> Dataset:
    """Open one split and check it, without reading the shards through.

    A folder at s3://, gs://, hf:// or https:// is staged into a local cache: see `remote`. Its shards are checked when
    they arrive.

    Raises:
        DataError: the folder, `dataset.json`, the split, a shard or an index is missing; a shard has another size than
            `dataset.json` says, or is no tar; an index is older than its tar, or belongs to another; a sample has no
            caption or no image.
    """
    stage = stage_for(str(folder)) if is_remote(folder) else None
    folder = Path(folder) if stage is None else stage.folder
    description = read_description(folder)
    if split not in description["splits"]:
        raise DataError(
            f"{folder}: wanted the split {split}, found {', '.join(description['splits'])}; name one of these"
        )
    shards = description["splits"][split]["shards"]
    if stage is not None:
        stage.expect(shards)
    tars, indices = [], []
    for shard in shards:
        tar, path = shard_files(folder, shard)
        if stage is None:
            _check_tar(tar, shard["bytes"])
        tars.append(tar)
        indices.append(_read_index(tar, path, shard, local=stage is None))
    counts = np.array([len(index.begin) for index in indices], np.int64)
    if not counts.sum():
        raise DataError(f"{folder}: wanted samples in the split {split}, found none; build the data set again")
    parts = {
        kind: Part(*(np.concatenate([getattr(i.parts[kind], field) for i in indices]) for field in ("offset", "size")))
        for kind in KINDS
    }
    first = np.cumsum(counts) - counts
    shard_of = np.repeat(np.arange(len(tars)), counts)
    # The offsets tell apart views of the same shards that name other samples, or the same ones in another order.
    digest = hashlib.sha256(json.dumps([split, [[s["samples"], s["sha256"]] for s in shards]]).encode())
    digest.update(parts["image"].offset.tobytes())
    dataset = Dataset(
        folder=folder,
        split=split,
        tars=tars,
        shard=shard_of,
        first=first,
        indices=indices,
        keys=Keys(indices, shard_of, first),
        image=parts["image"],
        text=parts["text"],
        meta=parts["meta"],
        tokens=parts["tokens"],
        description=description,
        fingerprint=digest.hexdigest()[:32],
        stage=stage,
    )
    for i in np.flatnonzero(dataset.text.size <= _SHORT) if stage is None else ():
        dataset.captions(int(i))  # raises if it is blank
    return dataset


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
    except ValueError as error:
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


def _check_tar(tar: Path, size: int) -> None:
    if not tar.is_file():
        raise DataError(f"{tar}: wanted a shard that dataset.json names, found no such file; restore it or build again")
    found = tar.stat().st_size
    if found != size:
        what = "an empty file" if found == 0 else f"{found} bytes"
        raise DataError(
            f"{tar}: wanted {size} bytes as in dataset.json, found {what}; restore it or build the data set again"
        )
    with tar.open("rb") as file:
        header = file.read(tarfile.BLOCKSIZE)
    _header(tar, header)


def _header(tar: Path, block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{tar}: wanted a tar file, found something unreadable ({error}); restore it or build the data set again"
        ) from None


def _read_index(tar: Path, path: Path, shard: dict[str, Any], *, local: bool) -> Index:
    """The index of a shard, checked against the tar at its first and last samples where that is here."""
    samples = shard["samples"]
    hint = "make the view again" if "index" in shard else f"make it again with `wds2idx {tar} {path}`"
    if not path.is_file():
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}")
    if local and path.stat().st_mtime_ns < tar.stat().st_mtime_ns:
        raise DataError(f"{path}: wanted an index at least as new as {tar.name}, found an older one; {hint}")
    text = path.read_bytes()
    if "index_sha256" in shard and hashlib.sha256(text).hexdigest() != shard["index_sha256"]:
        raise DataError(f"{path}: wanted the index that dataset.json names, found another; {hint}")
    head, lines = head_of(text)
    if head.split() != ["v1.2", str(lines)] or lines != samples:
        raise DataError(f"{path}: wanted a v1.2 index of {samples} samples, found {head!r} and {lines} lines; {hint}")
    if not lines:
        text = b"v1.2 0\n"
    try:
        index = parse(text)
    except ValueError as error:
        raise DataError(
            f"{path}: wanted `extension offset size name` of each component, found {error}; {hint}"
        ) from None
    for kind, what in (("image", f"an image ({', '.join(IMAGE_EXTENSIONS)})"), ("text", "at least one caption")):
        missing = np.flatnonzero(index.parts[kind].size <= 0)
        if len(missing):
            raise DataError(
                f"{tar} key {index.key(int(missing[0]))}: wanted {what}, found none; remove the sample"
                + (" or write its captions" if kind == "text" else "")
            )
    if local:
        _compare(tar, path, index)
    return index


def _compare(tar: Path, path: Path, index: Index) -> None:
    """Compare an index with its tar at the first, the middle and the last sample. Raises DataError."""
    rows = len(index.begin)
    end = tar.stat().st_size
    with tar.open("rb") as file:
        for row in dict.fromkeys((0, rows // 2, rows - 1)) if rows else ():
            for kind, part in index.parts.items():
                offset, size = int(part.offset[row]), int(part.size[row])
                if size < 0:
                    continue
                name = index.name(row, kind)
                file.seek(max(0, offset - tarfile.BLOCKSIZE))
                block = file.read(tarfile.BLOCKSIZE)
                # As nearly all headers are; the general way takes ten times as long.
                usual = name.encode(errors="surrogateescape").ljust(100, b"\0"), b"%011o" % size
                if offset + size <= end and (block[:100], block[124:136].rstrip(b"\0 ")) == usual:
                    continue
                try:
                    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    member = None
                # Headers spell long and non-ASCII names in other ways than indices do.
                plain = name.isascii() and len(name) <= 100 and not {"\\", "%"} & set(name)
                fits = member is not None and member.size == size and (member.name == name or not plain)
                if offset + size > end or not fits:
                    raise DataError(
                        f"{path}: wanted the index of {tar.name}, found that {name} is not where it says; "
                        f"make it again with `wds2idx {tar} {path}`"
                    )
