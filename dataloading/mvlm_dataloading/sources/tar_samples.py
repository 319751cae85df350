"""Sequential reader of samples in WebDataset tars that other tools wrote."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from mvlm_dataloading.errors import DataError

from .record import TOO_LARGE

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "caption")
_TEXTS = (*CAPTION_EXTENSIONS, "json", "cls")
# Not read. A sample that has only such files is rejected with a reason and not passed over in silence.
_OTHERS = ("gif", "bmp", "tif", "tiff", "npy", "tok")
_MAX_TEXT = 1 << 22


@dataclass(slots=True)
class TarSample:
    """A sample of a tar: consecutive members with the same key."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    """Content by extension, in lower case."""
    long_metadata: bool = False
    """True if the `.json` is too long and was not read."""
    fault: str | None = None


def read_samples(path: Path, max_bytes: int) -> Iterator[TarSample]:
    """Yield the samples of a tar in one sequential read. Nothing is unpacked.

    A hard link to a file before it in the tar stands for that file. Other links, and devices, are skipped.

    For a damaged tar, the last sample has the tar's name as its key and the damage as its fault.

    Raises:
        DataError: the tar cannot be read just now. A tar that is damaged would give the same samples again.
    """
    sample: TarSample | None = None
    damage, ended, whole = None, True, False
    try:
        with (
            _opened(path) as file,
            _opened(path) as again,
            tarfile.open(fileobj=cast(IO[bytes], tail := _Tail(file)), mode="r|") as tar,
        ):
            links = _Links(again)
            for member in tar:
                if not links.follow(member) or member.name.rsplit("/", 1)[-1].startswith("."):
                    continue
                key, extension = split_member_name(member.name)
                if extension not in IMAGE_EXTENSIONS + _TEXTS + _OTHERS:
                    continue
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key)
                _add(sample, links if member.islnk() else tar, member, extension, max_bytes)
            whole = True  # bytes after the tar in a compressed file may yet be an error
            ended = tail.ends_with_an_empty_block()
    except (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of the disk or the network; gzip's errors have none
            raise DataError(
                f"{path}: wanted a tar that can be read, found {error}; run the same command again"
            ) from None
        damage = "tar is damaged from here on" if sample else f"tar cannot be read ({type(error).__name__})"
        damage = "tar is damaged after its samples" if whole else damage
    if sample is not None:
        if damage is not None and not whole and sample.fault is None and _is_incomplete(sample):
            sample.fault = damage
        yield sample
    if damage is None and not ended:
        damage = "tar ends early"
    if damage is not None:
        yield TarSample(path.name, fault=damage)


def has_end_block(path: Path) -> bool:
    """True if a tar ends with an empty block. A tar that was truncated between two members does not."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        return file.read() == bytes(tarfile.BLOCKSIZE)


def _opened(path: Path) -> IO[bytes]:
    """The content of a tar, unpacked by what it begins with. Reading a cut archive to its end raises EOFError."""
    with path.open("rb") as file:
        first = file.read(10)
    # A plain tar begins with a member's name, which may be "BZh1.jpg". bzip2 continues with the digits of pi.
    for magic, opener in ((rb"\x1f\x8b\x08", gzip.open), (rb"BZh[1-9]1AY&SY", bz2.open), (rb"\xfd7zXZ\x00", lzma.open)):
        if re.match(magic, first):
            return cast(IO[bytes], opener(path, "rb"))
    return path.open("rb")


class _Tail:
    """A file that is read in order and remembers its last block."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._last = file, b""

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._last = (self._last + content[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return content

    def ends_with_an_empty_block(self) -> bool:
        """Read to the end. False for a tar that was truncated: where a header begins, `tarfile` takes it for whole."""
        while self.read(1 << 20):
            pass
        return self._last == bytes(tarfile.BLOCKSIZE)


class _Links:
    """The files of a tar by name, for the hard links to them. They are read a second time, from a file of their own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}
        self._last: tuple[tuple[int, int], bytes] | None = None

    def follow(self, member: tarfile.TarInfo) -> bool:
        """Give a hard link place and size of its file. False for a member that has no content."""
        if member.islnk() and member.linkname in self._places:
            member.offset_data, member.size = self._places[member.linkname]
        elif not member.isfile():
            return False
        if not member.issparse():
            self._places[member.name] = member.offset_data, member.size
        return True

    def extractfile(self, member: tarfile.TarInfo) -> IO[bytes]:
        place = member.offset_data, member.size
        if self._last is None or self._last[0] != place:  # questions about an image follow one another
            self._file.seek(member.offset_data)
            self._last = place, self._file.read(member.size)
        return io.BytesIO(self._last[1])


def _add(
    sample: TarSample, tar: "tarfile.TarFile | _Links", member: tarfile.TarInfo, extension: str, max_bytes: int
) -> None:
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
    file = tar.extractfile(member)
    content = file.read() if file is not None else b""
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
