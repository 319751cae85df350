"""One split of a data set: random access to its samples, and comparison of its shards with their index."""

import contextlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links.cache import LinkedIndex
from mvlm_dataloading.links.samples import LinkReader
from mvlm_dataloading.randomness import text_hash
from mvlm_dataloading.tar_walk import DamagedTar, TarWalk
from mvlm_dataloading.untrusted import open_regular, require_regular

from .dali_index import KINDS, Int64
from .description import index_command, shard_paths
from .remote_cache import RemoteCache
from .sample_index import SampleIndex


class Keys:
    """Sequence of the keys of a split's samples, each of which is read from the index when it is asked for."""

    def __init__(self, index: SampleIndex | LinkedIndex, start: int, stop: int):
        self._index, self._start, self._stop = index, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, i: int) -> str:
        return self._index.key(self._start + int(i))

    def tolist(self) -> list[str]:
        return [self[i] for i in range(len(self))]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """One split of a data folder, made by `open_dataset`. A sample's id is its position, 0 to len - 1.

    Shape legend: n samples of a request, N samples of the split, S shards.
    """

    folder: Path
    split: str
    tars: list[Path]
    """Path of each shard, a tar."""
    index: SampleIndex | LinkedIndex
    """Index of the whole split."""
    start: int
    """Position in `index` of the first sample: a data set may be a range of the split (`rows`)."""
    stop: int
    """Position in `index` behind the last sample."""
    description: dict[str, Any]
    """Content of `dataset.json`."""
    fingerprint: str
    """Hash of the split's samples and their order."""
    remote: RemoteCache | None = None
    """The cache of a remote data set, which fetches its shards. `tars` are then paths in the cache."""
    links: LinkReader | None = None
    """Reader of the samples of linked data."""
    compared: set[int] = field(default_factory=set)
    """Indices in `tars` of the local shards that have been compared with the index."""

    def __len__(self) -> int:
        return self.stop - self.start

    def head(self, count: int) -> "Dataset":
        """The first `count` samples as a data set, or all of them if there are fewer."""
        return self if count >= len(self) else self.rows(0, count)

    def rows(self, start: int, stop: int) -> "Dataset":
        """The samples `start` to `stop` - 1 as a data set, in which their ids begin at 0."""
        return replace(
            self,
            start=self.start + start,
            stop=self.start + stop,
            fingerprint=f"{self.fingerprint}:{stop}" if start == 0 else f"{self.fingerprint}:{start}:{stop}",
        )

    @property
    def keys(self) -> Keys:
        return Keys(self.index, self.start, self.stop)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """The split's shards, as `dataset.json` describes them."""
        return self.description["splits"][self.split]["shards"]

    @property
    def shard_sizes(self) -> Int64:
        """Number of samples of this data set in each shard, int64 (S,)."""
        return np.diff(np.clip(self.index.first, self.start, self.stop))

    def row_groups(self) -> dict[int, Int64]:
        """Number of these samples in each row group that has some, int64, by shard; of linked Parquet files."""
        found = {}
        for number, shard in enumerate(self.shards):
            if "groups" in shard:
                ends = self.index.first[number] + np.append(0, np.cumsum(shard["groups"], dtype=np.int64))
                sizes = np.diff(np.clip(ends, self.start, self.stop))
                found[number] = sizes[sizes > 0]
        return found

    def shard_of(self, ids: Any) -> Int64:
        """Position in `tars` of each sample's shard, int64, of the shape of `ids`. It ascends with the id."""
        return self.index.shard_of(np.asarray(ids) + self.start)

    def locate(self, kind: str, ids: Any) -> tuple[Int64, Int64]:
        """Byte offset of a component in its tar, and its size in bytes, of each sample: int64 of the shape of `ids`.

        Args:
            kind: image, text, meta or tokens. The size of a component that a sample lacks is -1.
        """
        return self.index.locate(kind, np.asarray(ids) + self.start)

    def first_of_image(self) -> Int64:
        """Id of the first sample with the same stored image, for each sample: int64 (N,).

        Samples whose images are stored twice differ, even if the images are equal.
        """
        ids = np.arange(len(self))
        if self.links is not None:
            return ids
        places = np.stack([self.shard_of(ids), self.locate("image", ids)[0]])  # (2, N)
        _, first, image = np.unique(places, axis=1, return_index=True, return_inverse=True)
        return first[image.reshape(-1)].astype(np.int64)

    def check_shards(self, shards: Sequence[int]) -> None:
        """Check local shards before they are read: their sizes, and once in a process three of their samples.

        A shard that is shorter than its index says would end the process with SIGBUS, because DALI maps it.

        Raises:
            DataError: a shard is missing, has another size than `dataset.json` says, or does not match the index.
        """
        if self.remote is not None:  # shards are checked when they are fetched
            return
        for shard in shards:
            check_size(self.tars[shard], self.shards[shard]["bytes"])
            if shard not in self.compared:
                source = self.index.path or shard_paths(self.folder, self.shards[shard])[1]
                hint = f"restore the shard, or make the index again with {index_command(self.folder)}"
                compare_with_tar(self.index, shard, self.tars[shard], source, hint)
                self.compared.add(shard)

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
        return parse_captions(self._read("text", i), lambda: self.where(i))

    def captions_of(self, ids: Sequence[int]) -> Iterator[list[str]]:
        """All captions of samples whose ids ascend. Those of linked data are read many at a time, without images."""
        if self.links is None:
            yield from map(self.captions, ids)
            return
        places = np.asarray(ids, np.int64) + self.start
        shards = self.index.shard_of(places)
        for shard in np.unique(shards).tolist():
            rows = places[shards == shard] - self.index.first[shard]
            for sample in self.links.samples(shard, rows.tolist(), images=False):
                i = int(self.index.first[shard]) + sample.row - self.start
                yield parse_captions(sample.text, partial(self.where, i))

    def metadata(self, i: int) -> dict[str, Any]:
        """Content of `<key>.json`; empty for a sample without metadata."""
        return parse_metadata(self._read("meta", i), lambda: self.where(i))

    def image_bytes(self, i: int) -> bytes:
        """Encoded image of sample i, as stored."""
        return self._read("image", i)

    def image_id(self, i: int) -> int:
        """Id of the sample's image, int64, equal for samples of the same image. The values of `Batch.image_id`."""
        return image_identity(self.metadata(i), lambda: self.image_bytes(i))

    def where(self, i: int) -> str:
        """Location of sample i for messages: tar, offset and key."""
        if self.links is not None:
            return self.links.where(self.start + int(i))
        return f"{self.tars[int(self.shard_of(i))]} offset {self.locate('image', i)[0]} key {self.keys[i]}"

    def _read(self, kind: str, i: int) -> bytes:
        if self.links is not None and not self.tars[int(self.shard_of(i))].is_file():  # the cache does not have it
            sample = self.links.one(self.start + int(i))
            return {"image": sample.image, "text": sample.text, "meta": sample.metadata}[kind]
        offset, size = map(int, self.locate(kind, i))
        if size < 0:
            return b""
        shard = int(self.shard_of(i))
        if shard not in self.compared:
            self.check_shards([shard])
        with (
            self.remote.reading(shard) if self.remote else contextlib.nullcontext(),
            open_regular(self.tars[shard]) as tar,
        ):
            tar.seek(offset)
            content = tar.read(size)
        if len(content) != size:
            raise DataError(f"{self.where(i)}: wanted the shard that was opened, found a shorter one; restore it")
        return content


def check_size(tar: Path, size: int) -> os.stat_result:
    """The file's status. Raises DataError if a shard is missing, no file, or has another size than described."""
    try:
        status = tar.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{tar}: wanted a shard that dataset.json names, found no such file; restore it or build again"
        ) from None
    require_regular(tar, status)
    if status.st_size != size:
        what = "an empty file" if status.st_size == 0 else f"{status.st_size} bytes"
        raise DataError(
            f"{tar}: wanted {size} bytes as in dataset.json, found {what}; restore it or build the data set again"
        )
    return status


def compare_with_tar(index: SampleIndex | LinkedIndex, shard: int, tar: Path, source: Path, hint: str) -> None:
    """Compare the index of a shard with the tar: the headers of the first, the middle and the last sample.

    Components of the other samples have to lie inside the tar: DALI maps it, and reading beyond it would end the
    process.

    Args:
        source: file from which the index was read, for messages.
        hint: what to do, for messages.

    Raises:
        DataError: a component is not where the index says.
    """
    first, end = index.first[shard : shard + 2].tolist()
    if first == end:
        return
    length, rows = tar.stat().st_size, [first, (first + end) // 2, end - 1]
    for kind in KINDS:
        offset, size = index.locate(kind, np.arange(first, end))
        beyond = np.flatnonzero((size >= 0) & (offset + size > length))
        if len(beyond):
            raise DataError(
                f"{source}: wanted the index of {tar.name}, found that the {kind} of "
                f"{index.key(first + int(beyond[0]))} is not inside it; {hint}"
            )
    places = {kind: np.stack(index.locate(kind, rows), 1).tolist() for kind in KINDS}
    with open_regular(tar) as file:
        for row, i in enumerate(rows):
            key = index.key(i)
            for kind in KINDS:
                offset, size = places[kind][row]
                if size < 0:
                    continue
                header = _header(file, offset)
                good = _is_header_of(header, key, KINDS[kind], size)
                if not good and kind == "image":
                    owner = _owner(tar, _header(file, places["text"][row][0] - tarfile.BLOCKSIZE), key, KINDS[kind])
                    good = owner is not None and _is_header_of(header, owner, KINDS[kind], size)
                if not good:
                    raise DataError(
                        f"{source}: wanted the index of {tar.name}, found that the {kind} of {key} is not where it "
                        f"says; {hint}"
                    )


def _header(file: BinaryIO, offset: int) -> bytes:
    """Tar header, 512 bytes, of the member whose content begins at byte `offset`."""
    file.seek(max(0, offset - tarfile.BLOCKSIZE))
    return file.read(tarfile.BLOCKSIZE)


def _member(header: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _owner(tar: Path, before_text: bytes, key: str, extensions: tuple[str, ...]) -> str | None:
    """Key of the sample to whose image the image of sample `key` is a hard link in the tar, or None.

    Args:
        before_text: tar header before that of the sample's text, where builds put the link. Other tools put it
            anywhere.
        extensions: file name extensions of images.
    """
    member = _member(before_text)
    if member is not None and member.islnk() and member.name.rpartition(".")[0] == key:
        return member.linkname.rpartition(".")[0]
    with contextlib.suppress(DamagedTar), open_regular(tar) as file:
        for member in TarWalk(file, 0):
            stem, _, extension = member.name.rpartition(".")
            if member.islnk() and stem == key and extension.lower() in extensions:
                return member.linkname.rpartition(".")[0]
    return None


def _is_header_of(header: bytes, key: str, extensions: tuple[str, ...], size: int) -> bool:
    """True if a tar header describes a member of this key, one of these extensions and this size."""
    # Nearly all headers have this form. Parsing the general form takes ten times as long.
    if header[124:136].rstrip(b"\0 ") == b"%011o" % size:
        names = {f"{key}.{one}".encode(errors="surrogateescape").ljust(100, b"\0") for one in extensions}
        if header[:100] in names:
            return True
    member = _member(header)
    if member is None:
        return False
    # Headers encode long and non-ASCII names differently from indices, so these are compared by size alone.
    comparable = key.isascii() and len(key) <= 95 and not {"\\", "%"} & set(key)
    stem, _, extension = member.name.rpartition(".")
    return member.size == size and (not comparable or (stem == key and extension.lower() in extensions))


def parse_captions(text: bytes, where: Callable[[], str]) -> list[str]:
    """The nonblank lines of a `.txt` component. Raises DataError if all lines are blank or the text is not UTF-8."""
    try:
        captions = [line.strip() for line in text.decode("utf-8-sig").split("\n") if line.strip()]
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


def split_stored_tokens(content: bytes, count: int, where: str) -> list[NDArray[np.int32]]:
    """The tokens of each caption in a `.tok` component, which holds a count and the tokens, per caption.

    Raises:
        DataError: the component does not hold `count` captions.
    """
    words = np.frombuffer(content[: len(content) // 4 * 4], "<i4")
    found, at = [], 0
    while at < len(words) and 0 <= words[at] < len(words) - at:
        found.append(words[at + 1 : at + 1 + words[at]])
        at += 1 + int(words[at])
    if at != len(words) or len(content) % 4 or len(found) != count:
        raise DataError(
            f"{where}: wanted stored tokens of {count} captions, found {len(content)} bytes that hold {len(found)}; "
            "write the tokens again"
        )
    return found


def image_identity(metadata: dict[str, Any], image: Callable[[], bytes]) -> int:
    """Id of an image, int64: a hash of the metadata's `image_id`, or of the encoded image if it has none."""
    name = image_name(metadata)
    return text_hash(image() if name is None else f"image_id {name}")


def image_name(metadata: Mapping[str, Any]) -> str | None:
    """The `image_id` of a sample's metadata, which samples of one image share; None if it has none, or an empty one."""
    given = metadata.get("image_id")
    return None if given in (None, "") else str(given)


def first_samples(metadata: Iterable[Mapping[str, Any]]) -> list[int]:
    """For each sample, the number of the first sample of the same image, by the `image_id` in their metadata.

    A sample without an `image_id` gets its own number. metadata: that of all samples, in order.
    """
    named: dict[str, int] = {}
    names = map(image_name, metadata)
    return [i if name is None else named.setdefault(name, i) for i, name in enumerate(names)]
