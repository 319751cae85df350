"""Opening a data set, with all checks that do not read whole shards."""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.errors import DataError

from .dali_index import IMAGE_EXTENSIONS, KINDS, Component, DaliIndex, parse_index, read_head
from .dataset import Dataset, Keys
from .description import read_description, shard_paths
from .remote_cache import RemoteCache, open_remote_cache
from .remote_files import is_remote

_REMOTE_HINT = "open the data set again, which fetches it again; if that does not help, rebuild it at the source"
_SHORT = 8  # bytes; a `.txt` of at most this size may be blank, so it is read when the data set is opened


def open_dataset(folder: Path | str, split: str) -> Dataset:
    """Open one split and check it, without reading whole shards.

    A folder at s3://, gs://, hf:// or https:// is cached locally, see `remote_cache`. Its shards are checked when they
    are fetched.

    Raises:
        DataError: the folder, `dataset.json`, the split, a shard or an index is missing; a shard is no tar, or its size
            differs from `dataset.json`; an index is older than its tar or belongs to another one; a sample has no
            caption or no image.
    """
    remote = open_remote_cache(str(folder)) if is_remote(folder) else None
    folder = Path(folder) if remote is None else remote.folder
    description = read_description(folder)
    shards = _shards_of_split(folder, description, split)
    if remote is None:
        opened = [_open_local_shard(folder, shard) for shard in shards]
    else:
        opened = _open_remote_shards(remote, shards)
    dataset = _join_shards(folder, split, description, opened, remote)
    if remote is None:
        for i in np.flatnonzero(dataset.text.size <= _SHORT):
            dataset.captions(int(i))  # raises if it is blank
    return dataset


@dataclass(frozen=True, slots=True)
class _OpenShard:
    tar: Path
    index_path: Path
    index: DaliIndex


def _shards_of_split(folder: Path, description: dict[str, Any], split: str) -> list[dict[str, Any]]:
    if split not in description["splits"]:
        known = ", ".join(description["splits"])
        hint = "name one of these" + (", or use a data set with training samples" if split == "train" else "")
        raise DataError(f"{folder}: wanted the split {split}, found {known}; {hint}")
    return description["splits"][split]["shards"]


def _open_local_shard(folder: Path, shard: dict[str, Any]) -> _OpenShard:
    tar, path = shard_paths(folder, shard)
    _check_tar(tar, shard["bytes"])
    return _OpenShard(tar, path, _read_index(tar, path, shard))


def _open_remote_shards(remote: RemoteCache, shards: list[dict[str, Any]]) -> list[_OpenShard]:
    """Read the indices of remote shards. Each shard is compared with its index after it is fetched."""
    remote.register_shards(shards)
    opened = []
    for shard in shards:
        tar, path = shard_paths(remote.folder, shard)
        try:
            index = _read_index(tar, path, shard, local=False)
        except DataError:  # a cached index may be old or damaged
            remote.fetch_index(shard)
            index = _read_index(tar, path, shard, local=False)
        opened.append(_OpenShard(tar, path, index))
    remote.verify = lambda i: _compare_with_tar(opened[i], _REMOTE_HINT)
    return opened


def _join_shards(
    folder: Path, split: str, description: dict[str, Any], opened: Sequence[_OpenShard], remote: RemoteCache | None
) -> Dataset:
    indices = [shard.index for shard in opened]
    counts = np.array([len(index.begin) for index in indices], np.int64)
    if not counts.sum():
        raise DataError(f"{folder}: wanted samples in the split {split}, found none; build the data set again")
    components = {
        kind: Component(
            offset=np.concatenate([index.components[kind].offset for index in indices]),
            size=np.concatenate([index.components[kind].size for index in indices]),
        )
        for kind in KINDS
    }
    first = np.cumsum(counts) - counts
    shard = np.repeat(np.arange(len(opened)), counts)
    # Offsets are included, because views of the same shards may choose other samples or another order.
    described = description["splits"][split]["shards"]
    digest = hashlib.sha256(json.dumps([split, [[one["samples"], one["sha256"]] for one in described]]).encode())
    digest.update(components["image"].offset.tobytes())
    return Dataset(
        folder=folder,
        split=split,
        tars=[one.tar for one in opened],
        shard=shard,
        first=first,
        indices=indices,
        keys=Keys(indices, shard, first),
        **components,
        description=description,
        fingerprint=digest.hexdigest()[:32],
        remote=remote,
    )


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
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{tar}: wanted a tar file, found something unreadable ({error}); restore it or build the data set again"
        ) from None


def _read_index(tar: Path, path: Path, shard: dict[str, Any], *, local: bool = True) -> DaliIndex:
    """Read and check a shard's index. A local one is also compared with its tar."""
    hint = "make the view again" if "index" in shard else f"make it again with `wds2idx {tar} {path}`"
    if not local:
        hint = _REMOTE_HINT
    if not path.is_file():
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}")
    if local and path.stat().st_mtime_ns < tar.stat().st_mtime_ns:
        if "index" not in shard:
            hint = f"make it again with `mvlm data index {tar.parent}` (copied without their times, as cp -r does?)"
        raise DataError(f"{path}: wanted an index at least as new as {tar.name}, found an older one; {hint}")
    text = path.read_bytes()
    if "index_sha256" in shard and hashlib.sha256(text).hexdigest() != shard["index_sha256"]:
        raise DataError(f"{path}: wanted the index that dataset.json names, found another; {hint}")
    index = _parse(path, text, shard["samples"], hint)
    for kind, what in (("image", f"an image ({', '.join(IMAGE_EXTENSIONS)})"), ("text", "at least one caption")):
        missing = np.flatnonzero(index.components[kind].size <= 0)
        if len(missing):
            raise DataError(
                f"{tar} key {index.key(int(missing[0]))}: wanted {what}, found none; remove the sample"
                + (" or write its captions" if kind == "text" else "")
            )
    if local:
        _compare_with_tar(_OpenShard(tar, path, index), hint)
    return index


def _parse(path: Path, text: bytes, samples: int, hint: str) -> DaliIndex:
    head, lines = read_head(text)
    if head.split() != ["v1.2", str(lines)] or lines != samples:
        raise DataError(f"{path}: wanted a v1.2 index of {samples} samples, found {head!r} and {lines} lines; {hint}")
    try:
        return parse_index(text if lines else b"v1.2 0\n")
    except ValueError as error:
        raise DataError(
            f"{path}: wanted `extension offset size name` of each component, found {error}; {hint}"
        ) from None


def _compare_with_tar(shard: _OpenShard, hint: str) -> None:
    """Compare an index with its tar at the first, the middle and the last sample. Raises DataError."""
    tar, index = shard.tar, shard.index
    rows = len(index.begin)
    end = tar.stat().st_size
    with tar.open("rb") as file:
        for row in dict.fromkeys((0, rows // 2, rows - 1)) if rows else ():
            for kind, component in index.components.items():
                offset, size = int(component.offset[row]), int(component.size[row])
                if size < 0:
                    continue
                name = index.name(row, kind)
                file.seek(max(0, offset - tarfile.BLOCKSIZE))
                header = file.read(tarfile.BLOCKSIZE)
                if offset + size > end or not _is_header_of(header, name, size):
                    raise DataError(
                        f"{shard.index_path}: wanted the index of {tar.name}, found that {name} is not where it says; "
                        f"{hint}"
                    )


def _is_header_of(header: bytes, name: str, size: int) -> bool:
    """True if a tar header describes a member of this name and size."""
    # Nearly all headers have this form. Parsing the general form takes ten times as long.
    if (header[:100], header[124:136].rstrip(b"\0 ")) == (
        name.encode(errors="surrogateescape").ljust(100, b"\0"),
        b"%011o" % size,
    ):
        return True
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    # Headers encode long and non-ASCII names differently from indices, so these are compared by size alone.
    comparable = name.isascii() and len(name) <= 100 and not {"\\", "%"} & set(name)
    return member.size == size and (member.name == name or not comparable)
