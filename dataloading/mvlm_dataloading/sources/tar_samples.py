"""Sequential reader of samples in WebDataset tars that other tools wrote."""

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.images.limits import TOO_LARGE
from mvlm_dataloading.tar_walk import DamagedTar, Member, TarWalk
from mvlm_dataloading.untrusted import open_regular, opened_unchanged

from .record import file_fingerprint

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "caption")
_TEXTS = (*CAPTION_EXTENSIONS, "json", "cls")
# Not read. A sample that has only such files is rejected with a reason and not passed over in silence.
_OTHERS = ("gif", "bmp", "tif", "tiff", "npy", "tok")
_MAX_TEXT = 1 << 22
CUT = "tar ends early"
"""Fault of a tar that was cut. What it held behind the cut is not known."""


@dataclass(slots=True)
class TarSample:
    """A sample of a tar: consecutive members with the same key."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Content of each file of the sample, by its extension in lower case."""
    long_metadata: bool = False
    """True if the `.json` is too long and was not read."""
    fault: str | None = None


def read_samples(path: Path, max_bytes: int, fingerprint: Sequence[Any] | None = None) -> Iterator[TarSample]:
    """Yield the samples of a tar in one sequential read. Nothing is unpacked.

    A hard link to a file before it in the tar stands for that file. Other links, and devices, are skipped.

    For a tar that was cut, the last sample has the tar's name as its key, and a fault that says so.

    Args:
        fingerprint: that of the file (`file_fingerprint`) when the build began.

    Raises:
        DataError: the tar has blocks that belong to no member, with others after them that would be lost; it is not the
            file of the plan, or changes while it is read; or it cannot be read just now.
    """
    try:
        with opened_unchanged(path) as raw:
            if fingerprint is not None and list(fingerprint) != file_fingerprint(path, raw):
                raise DataError(f"{path}: wanted the tar that the build began with, found another; build again")
            yield from _samples(path, raw, max_bytes)
    except OSError as error:
        raise DataError(f"{path}: wanted a tar that can be read, found {error}; run the same command again") from None


def _samples(path: Path, raw: BufferedReader, max_bytes: int) -> Iterator[TarSample]:
    sample, fault = None, None
    links = _Links(path, raw)
    walk = TarWalk(_unpacked(raw), max(max_bytes, _MAX_TEXT))
    try:
        for member in walk:
            if not links.follow(member) or member.name.rsplit("/", 1)[-1].startswith("."):
                continue
            key, extension = split_member_name(member.name)
            if extension not in IMAGE_EXTENSIONS + _TEXTS + _OTHERS:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = TarSample(key)
            _add(sample, links if member.islnk() else walk, member, extension, max_bytes)
    except DamagedTar as damage:
        if not damage.cut and not damage.whole:
            raise DataError(
                f"{path}: wanted a tar whose every block belongs to a file of it, found {damage}; download it "
                "again, or leave it out"
            ) from None
        fault = "tar is damaged after its samples" if damage.whole else CUT
        if sample is not None and not damage.whole and sample.fault is None and _is_incomplete(sample):
            sample.fault = "tar ends inside this sample"
    finally:
        links.close()
    if sample is not None:
        yield sample
    if fault is not None:
        yield TarSample(path.name, fault=fault)


def _unpacked(raw: BufferedReader) -> IO[bytes]:
    """The content of a tar, unpacked by what it begins with. Reading a cut archive to its end raises EOFError."""
    raw.seek(0)
    first = raw.read(10)
    raw.seek(0)
    # A plain tar begins with a member's name, which may be "BZh1.jpg". bzip2 continues with the digits of pi.
    if first.startswith(b"\x1f\x8b\x08"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if re.match(rb"BZh[1-9]1AY&SY", first):
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if first.startswith(b"\xfd7zXZ\x00") else raw


class _Links:
    """Finds the files of a tar to which hard links point, and reads them from the tar, opened a second time.

    Args:
        path: the tar.
        raw: the open tar, which must be the file that is opened again, at the first link that is read.
    """

    def __init__(self, path: Path, raw: BufferedReader) -> None:
        self._path, self._raw = path, raw
        self._again: tuple[BufferedReader, IO[bytes]] | None = None
        self._places: dict[str, tuple[int, int]] = {}
        self._last: tuple[tuple[int, int], bytes] | None = None

    def follow(self, member: Member) -> bool:
        """Set offset and size of a hard link to those of the file that it links to.

        False for a member that has no content.
        """
        if member.islnk() and member.linkname in self._places:
            member.offset_data, member.size = self._places[member.linkname]
        elif not member.isfile():
            return False
        if not member.issparse():
            self._places[member.name] = member.offset_data, member.size
        return True

    def read(self, member: Member) -> bytes:
        place = member.offset_data, member.size
        if self._last is None or self._last[0] != place:  # questions about an image follow one another
            if self._again is None:
                raw = open_regular(self._path)
                if not os.path.samestat(os.fstat(raw.fileno()), os.fstat(self._raw.fileno())):
                    raw.close()
                    raise DataError(f"{self._path}: wanted the tar that was opened, found another; build again")
                self._again = raw, _unpacked(raw)
            file = self._again[1]
            file.seek(member.offset_data)
            self._last = place, file.read(member.size)
        return self._last[1]

    def close(self) -> None:
        if self._again is not None:
            self._again[0].close()


def _add(sample: TarSample, tar: TarWalk | _Links, member: Member, extension: str, max_bytes: int) -> None:
    if extension in _OTHERS:
        return
    if extension in sample.parts or (
        extension in IMAGE_EXTENSIONS and any(one in sample.parts for one in IMAGE_EXTENSIONS)
    ):
        sample.fault = "sample has two files of the same kind"
        return
    if member.size > (max_bytes if extension in IMAGE_EXTENSIONS else _MAX_TEXT):
        if extension == "json":
            sample.long_metadata = True
        else:
            sample.fault = TOO_LARGE if extension in IMAGE_EXTENSIONS else "caption is too long"
        return
    content = tar.read(member)
    sample.parts[extension] = content
    if len(content) != member.size:
        sample.fault = "tar ends inside this sample"


def _is_incomplete(sample: TarSample) -> bool:
    return not any(one in sample.parts for one in IMAGE_EXTENSIONS) or not any(
        one in sample.parts for one in (*CAPTION_EXTENSIONS, "json")
    )


def split_member_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the last dot. Keys with dots are common, `a.seg.png` is rare."""
    stem, _, extension = name.rpartition(".")
    return (stem.removeprefix("./"), extension.lower()) if stem and "/" not in extension else (name, "")
