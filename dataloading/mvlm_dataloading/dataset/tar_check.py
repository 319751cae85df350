"""Comparison of a shard with its description and its index."""

import contextlib
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import open_regular, require_regular
from mvlm_dataloading.tar_walk import DamagedTar, TarWalk

from .dali_index import KINDS
from .sample_index import SampleIndex


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


def check_is_tar(tar: Path) -> None:
    """Raise DataError if a file does not begin with a tar header."""
    with open_regular(tar) as file:
        header = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(
            f"{tar}: wanted a tar file, found something unreadable ({error}); restore it or build the data set again"
        ) from None


def compare_with_tar(index: SampleIndex, shard: int, tar: Path, source: Path, hint: str) -> None:
    """Compare an index with a tar at the shard's first, middle and last sample.

    Args:
        source: the file that the index was read from, for the message.

    Raises:
        DataError: a component is not where the index says.
    """
    first, end = index.first[shard : shard + 2].tolist()
    if first == end:
        return
    length, rows = tar.stat().st_size, [first, (first + end) // 2, end - 1]
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
                    owner = _linked(_header(file, places["text"][row][0] - tarfile.BLOCKSIZE), key)
                    owner = owner or _linked_anywhere(tar, key, KINDS[kind])
                    good = owner is not None and _is_header_of(header, owner, KINDS[kind], size)
                if not good or offset + size > length:
                    raise DataError(
                        f"{source}: wanted the index of {tar.name}, found that the {kind} of {key} is not where it "
                        f"says; {hint}"
                    )


def _header(file: BinaryIO, offset: int) -> bytes:
    """Header in front of the content at `offset`."""
    file.seek(max(0, offset - tarfile.BLOCKSIZE))
    return file.read(tarfile.BLOCKSIZE)


def _linked(header: bytes, key: str) -> str | None:
    """Key of the sample to whose image a header links the image of `key`, or None. It stands in front of the text."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return member.linkname.rpartition(".")[0] if member.islnk() and member.name.rpartition(".")[0] == key else None


def _linked_anywhere(tar: Path, key: str, extensions: tuple[str, ...]) -> str | None:
    """Key of the sample to whose image the image of `key` is a link in a tar of another tool; None without a link."""
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
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    # Headers encode long and non-ASCII names differently from indices, so these are compared by size alone.
    comparable = key.isascii() and len(key) <= 95 and not {"\\", "%"} & set(key)
    stem, _, extension = member.name.rpartition(".")
    return member.size == size and (not comparable or (stem == key and extension.lower() in extensions))
