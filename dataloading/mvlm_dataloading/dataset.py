"""Reading a data set: checks before anything is loaded, and random access to single samples."""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .randomness import text_hash
from .shards import read_description, shard_files

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_SHORT = 16  # bytes; a caption file of at most so many is read when the data set is opened, as it may be blank


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Where one component of every sample lies in its tar: arrays (n,)."""

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    """Bytes; -1 where a sample has no such component."""
    extension: NDArray[np.str_]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One split of a data folder. A sample's id is its position, 0 to len - 1. Made by `open_dataset`."""

    folder: Path
    split: str
    tars: list[Path]
    shard: NDArray[np.int64]
    """(n,) the position in `tars` of the shard that holds each sample."""
    keys: NDArray[np.str_]
    """(n,) the samples' names."""
    image: Part
    text: Part
    meta: Part
    description: dict[str, Any]
    """`dataset.json`."""
    fingerprint: str
    """Changes when the split's shards do."""

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def tokenizer_sha256(self) -> str | None:
        """The hash of the `tokenizer.json` that belongs to the data, or None."""
        return self.description.get("tokenizer")

    def captions(self, i: int) -> list[str]:
        """All captions of sample i, the main one first."""
        return parse_captions(self._read(self.text, i), self.where(i))

    def metadata(self, i: int) -> dict[str, Any]:
        """What `<key>.json` holds; empty if there is none."""
        return parse_metadata(self._read(self.meta, i), self.where(i))

    def image_bytes(self, i: int) -> bytes:
        """The encoded image."""
        return self._read(self.image, i)

    def image_id(self, i: int) -> int:
        """int64, equal for samples that show the same picture; the loader hands over the same."""
        return image_identity(self.metadata(i), self.image_bytes(i))

    def where(self, i: int) -> str:
        """Sample i for a message: tar, offset and key."""
        return f"{self.tars[self.shard[i]]} offset {self.image.offset[i]} key {self.keys[i]}"

    def _read(self, part: Part, i: int) -> bytes:
        if part.size[i] < 0:
            return b""
        with self.tars[self.shard[i]].open("rb") as tar:
            tar.seek(part.offset[i])
            return tar.read(part.size[i])


def open_dataset(folder: Path | str, split: str) -> Dataset:
    """Open one split and check it, without reading the shards through.

    Raises:
        DataError: the folder, `dataset.json`, the split, a shard or an index is missing; a shard has another size than
            `dataset.json` says, or is no tar; an index is older than its tar, or belongs to another; a sample has no
            caption or no image.
    """
    folder = Path(folder)
    description = read_description(folder)
    if split not in description["splits"]:
        raise DataError(
            f"{folder}: wanted the split {split}, found {', '.join(description['splits'])}; name one of these"
        )
    shards = description["splits"][split]["shards"]
    tars, indices = zip(*(shard_files(folder, shard) for shard in shards), strict=True) if shards else ((), ())
    rows: list[_Row] = []
    numbers: list[int] = []
    for number, (tar, index, shard) in enumerate(zip(tars, indices, shards, strict=True)):
        _check_tar(tar, shard["bytes"])
        found = _read_index(tar, index, shard)
        rows += found
        numbers += [number] * len(found)
    if not rows:
        raise DataError(f"{folder}: wanted samples in the split {split}, found none; build the data set again")
    contents = [[s["samples"], s["sha256"], *([s["index_sha256"]] if "index" in s else [])] for s in shards]
    digest = hashlib.sha256(json.dumps([split, contents]).encode()).hexdigest()
    dataset = Dataset(
        folder=folder,
        split=split,
        tars=list(tars),
        shard=np.array(numbers, np.int64),
        keys=np.array([row.key for row in rows]),
        image=_part([row.image for row in rows]),
        text=_part([row.text for row in rows]),
        meta=_part([row.meta for row in rows]),
        description=description,
        fingerprint=digest[:32],
    )
    for i in np.flatnonzero(dataset.text.size <= _SHORT):
        dataset.captions(int(i))  # raises if it is blank
    return dataset


def parse_captions(text: bytes, where: str) -> list[str]:
    """The nonblank lines of a `.txt` component. Raises DataError if there are none, or it is not UTF-8."""
    try:
        captions = [line.strip() for line in text.decode().split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{where}: wanted captions in UTF-8, found other bytes; remove the sample") from None
    if not captions:
        raise DataError(f"{where}: wanted at least one caption, found none; remove the sample or write its captions")
    return captions


def parse_metadata(text: bytes, where: str) -> dict[str, Any]:
    """The object in a `.json` component, empty if there is no component. Raises DataError if it is not an object."""
    if not text:
        return {}
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: wanted metadata as JSON, found {error}; remove the sample") from None
    if not isinstance(metadata, dict):
        raise DataError(
            f"{where}: wanted metadata as a JSON object, found {type(metadata).__name__}; remove the sample"
        )
    return metadata


def image_identity(metadata: dict[str, Any], image: bytes) -> int:
    """int64, equal for equal pictures: from the metadata's `image_id` if the source gave one, else from the bytes."""
    given = metadata.get("image_id")
    return text_hash(image if given is None else f"image_id {given}")


# key, and for image, text and metadata: (offset, size, extension), size -1 where there is none
@dataclass(slots=True)
class _Row:
    key: str
    image: tuple[int, int, str] = (0, -1, "")
    text: tuple[int, int, str] = (0, -1, "")
    meta: tuple[int, int, str] = (0, -1, "")


def _part(entries: list[tuple[int, int, str]]) -> Part:
    offset, size, extension = zip(*entries, strict=True)
    return Part(np.array(offset, np.int64), np.array(size, np.int64), np.array(extension))


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


def _read_index(tar: Path, path: Path, shard: dict[str, Any]) -> list[_Row]:
    """The samples of a shard, from its index, which is checked against the tar at its first and last samples."""
    samples = shard["samples"]
    hint = "make the view again" if "index" in shard else f"make it again with `wds2idx {tar} {path}`"
    if not path.is_file():
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}")
    if path.stat().st_mtime_ns < tar.stat().st_mtime_ns:
        raise DataError(f"{path}: wanted an index at least as new as {tar.name}, found an older one; {hint}")
    if "index" in shard and hashlib.sha256(path.read_bytes()).hexdigest() != shard["index_sha256"]:
        raise DataError(f"{path}: wanted the index that dataset.json names, found another; {hint}")
    head, *lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() or [""]
    if head.split() != ["v1.2", str(len(lines))] or len(lines) != samples:
        raise DataError(
            f"{path}: wanted a v1.2 index of {samples} samples, found {head!r} and {len(lines)} lines; {hint}"
        )
    rows = []
    try:
        for line in lines:
            words = line.split(" ")
            if len(words) % 4:
                raise ValueError(f"{len(words)} words in a line")
            rows.append(_parse_row(words))
    except ValueError as error:
        raise DataError(
            f"{path}: wanted `extension offset size name` of each component, found {error}; {hint}"
        ) from None

    end = tar.stat().st_size
    with tar.open("rb") as file:
        for row in dict.fromkeys((0, len(rows) // 2, len(rows) - 1)):
            for offset, size, extension in (rows[row].image, rows[row].text, rows[row].meta):
                if size < 0:
                    continue
                name = f"{rows[row].key}.{extension}"
                file.seek(max(0, offset - tarfile.BLOCKSIZE))
                block = file.read(tarfile.BLOCKSIZE)
                try:
                    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                except tarfile.HeaderError:
                    member = None
                # Headers spell long and non-ASCII names in other ways than indices do.
                plain = name.isascii() and len(name) <= 100 and not {"\\", "%"} & set(name)
                fits = member is not None and member.size == size and (member.name == name or not plain)
                if offset + size > end or not fits:
                    raise DataError(
                        f"{path}: wanted the index of {tar.name}, found that {name} is not where it says; {hint}"
                    )
    for row in rows:
        if row.image[1] <= 0:
            raise DataError(
                f"{tar} key {row.key}: wanted an image ({', '.join(IMAGE_EXTENSIONS)}), found none; remove the sample"
            )
        if row.text[1] <= 0:
            raise DataError(f"{tar} key {row.key}: wanted at least one caption, found none; remove the sample")
    return rows


def _parse_row(words: list[str]) -> _Row:
    row = _Row(words[3][: -len(words[0]) - 1])
    for extension, offset, size, _ in zip(*[iter(words)] * 4, strict=True):
        entry = (int(offset), int(size), extension)
        kind = extension.lower()
        if kind in IMAGE_EXTENSIONS:
            row.image = entry
        elif kind == "txt":
            row.text = entry
        elif kind == "json":
            row.meta = entry
    return row
