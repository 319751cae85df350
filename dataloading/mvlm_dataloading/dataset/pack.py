"""Packing the DALI indices of a split's shards into one index."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.regular_files import read_regular

from .dali_index import IMAGE_EXTENSIONS, DaliIndex, parse_index, read_head
from .description import shard_paths
from .index_writer import IndexWriter, pack_records
from .remote_cache import REMOTE_HINT
from .tar_check import check_is_tar, check_size


def pack_local(folder: Path, split: str, shards: Sequence[dict[str, Any]], file: BinaryIO) -> None:
    """Write a split's index to the empty file `file`, from the DALI indices of its shards.

    Raises:
        DataError: a shard or an index is missing; a shard is no tar, or has another size than described; an index is
            malformed, older than its tar, or lists a sample without an image or a caption.
    """
    writer = IndexWriter(file, split, shards)
    for shard in shards:
        tar, path = shard_paths(folder, shard)
        check_size(tar, shard["bytes"])
        check_is_tar(tar)
        if path.is_file() and path.stat().st_mtime_ns < tar.stat().st_mtime_ns:
            raise older_index(path, tar, view="index" in shard)
        _add(writer, tar, path, shard, local_hint(tar, path, shard))
    writer.finish()


def pack_remote(
    folder: Path,
    split: str,
    shards: Sequence[dict[str, Any]],
    file: BinaryIO,
    fetch_again: Callable[[dict[str, Any]], None],
) -> None:
    """Write a remote split's index to the empty file `file`, from cached DALI indices. Shards are not read.

    Args:
        folder: the cache folder.
        fetch_again: fetches a shard's index, of which the cached one cannot be used.

    Raises:
        DataError: an index is malformed, or lists a sample without an image or a caption.
    """
    writer = IndexWriter(file, split, shards)
    for shard in shards:
        tar, path = shard_paths(folder, shard)
        try:
            _add(writer, tar, path, shard, REMOTE_HINT)
        except DataError:
            fetch_again(shard)
            _add(writer, tar, path, shard, REMOTE_HINT)
    writer.finish()


def local_hint(tar: Path, path: Path, shard: dict[str, Any]) -> str:
    """The way to a good DALI index, for messages."""
    return "make the view again" if "index" in shard else f"make it again with `wds2idx {tar} {path}`"


def older_index(path: Path, tar: Path, *, view: bool) -> DataError:
    hint = "make the view again"
    if not view:
        hint = f"make it again with `mvlm data index {tar.parent}` (copied without their times, as cp -r does?)"
    return DataError(f"{path}: wanted an index at least as new as {tar.name}, found an older one; {hint}")


def _add(writer: IndexWriter, tar: Path, path: Path, shard: dict[str, Any], hint: str) -> None:
    """Append a shard's samples to an index. Nothing is appended if its DALI index cannot be used."""
    try:
        text = read_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: wanted the index of {tar.name}, found no such file; {hint}") from None
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
    for kind, part in index.components.items():
        beyond = np.flatnonzero(part.offset + part.size > shard["bytes"])
        if len(beyond):  # DALI would map it, and reading it would end the process
            key = index.key(int(beyond[0]))
            raise DataError(
                f"{path}: wanted the index of {tar.name}, found that the {kind} of {key} is not where it says; {hint}"
            )
    try:
        records = pack_records(index)
    except ValueError as error:
        raise DataError(f"{path}: wanted the index of {tar.name}, found {error}; {hint}") from None
    writer.add(records, index.keys)


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
