"""Walk over a tar that accounts for every block: a member, its padding, or the zeros at the end.

`tarfile` takes a damaged header, and a block of zeros before further members, for the end of the tar. It does not look
at what follows. It takes 40 us for a member, so headers of the usual form are parsed here, in 5.
"""

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

_ZEROS = 4 << 20
"""Most bytes of padding after a tar. Tools pad to a record of 10 KiB, for tapes to 1 MiB. An unfinished download, in a
file whose place on the disk had been reserved, ends with more."""
_CHUNK = 1 << 20
_UNPACKING = (EOFError, OSError, lzma.LZMAError, zlib.error)
_BLOCK = tarfile.BLOCKSIZE
_USUAL = re.compile(
    rb"([^\0]{1,99})\0{1,99}.{24}([0-7]{11})[\0 ].{12}([0-7]{6})\0 ([0x])\0{100}ustar(?:\x0000|  \0).{80}\0{155}.{12}",
    re.DOTALL,
)  # fmt: skip
"""A header: name, mode and owner, size, time, checksum, type, no link, magic, names of the owner, no prefix."""
_TIME = re.compile(rb"(\d{1,3}) mtime=\d+(?:\.\d+)?\n")
"""The extended header that Python's tarfile writes before each file, as webdataset does: a time with its fraction."""


class DamagedTar(Exception):
    """Error of a tar with blocks that belong to no member.

    Attributes:
        offset: byte from which on the blocks are not accounted for. In a compressed tar, of its unpacked content.
        found: what is there, for messages.
        cut: True if the file ends there, so that nothing follows that could be lost.
        whole: True if the tar's end was found, and only the compression around it is damaged.
    """

    def __init__(self, offset: int, found: str, *, cut: bool = False, whole: bool = False) -> None:
        super().__init__(f"{found} at byte {offset}")
        self.offset, self.found, self.cut, self.whole = offset, found, cut, whole


@dataclass(slots=True)
class PlainFile:
    """A regular file in a tar, with those attributes of a `tarfile.TarInfo` that readers here use."""

    name: str
    size: int
    offset: int
    """Byte offset of its first header in the tar."""
    offset_data: int
    """Byte offset of its content in the tar."""
    linkname: str = ""

    def isfile(self) -> bool:
        return True

    def islnk(self) -> bool:
        return False

    issparse = islnk


Member = PlainFile | tarfile.TarInfo


class TarWalk:
    """Iterator over the members of a tar, from the first block to the last.

    Args:
        file: the tar's content, uncompressed, at its beginning. It is read in order, and only sought forwards.
        most: largest member that `read` is called for, in bytes. It bounds what a header may make this read, too.

    Attributes:
        tar: the open `tarfile.TarFile`; None before the first member.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._blocks = _Blocks(file, most + tarfile.BLOCKSIZE)
        self.tar: tarfile.TarFile | None = None
        self._headers = _BLOCK  # bytes of the headers of a member, as it seems

    def __iter__(self) -> Iterator[Member]:
        """Yield the members. Raises DamagedTar where a block belongs to none; OSError if the disk fails."""
        end = 0
        while (member := self._next()) is not None:
            assert self.tar is not None
            if member.size < 0 or self.tar.offset <= end:  # this would not end
                raise DamagedTar(end, "a header of a negative size")
            end = self.tar.offset
            cast(Any, self.tar).members.clear()  # it keeps all, for random access
            yield member
        self._check_end(end)

    def read(self, member: Member) -> bytes:
        """Content of the member that was yielded last. Raises DamagedTar if the tar ends within."""
        assert self.tar is not None
        try:
            if isinstance(member, PlainFile):
                self._blocks.seek(member.offset_data)
                content = self._blocks.read(member.size)
                if len(content) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                return content
            file = self.tar.extractfile(member)
            return b"" if file is None else file.read()
        except tarfile.TarError:
            raise self._damage(member.offset) from None

    def _next(self) -> Member | None:
        at = 0 if self.tar is None else self.tar.offset
        if self.tar is not None and (plain := self._plain(self.tar)) is not None:
            return plain
        try:
            if self.tar is None:
                self.tar = tarfile.open(fileobj=cast(BinaryIO, self._blocks), mode="r:")  # noqa: SIM115 (the caller's)
            return self.tar.next()
        # What `tarfile` raises for damaged fields, not only its own errors.
        except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError):
            raise self._damage(at) from None

    def _plain(self, tar: tarfile.TarFile) -> PlainFile | None:
        """The next member, if its headers have the usual form; None leaves them to `tarfile`."""
        if cast(Any, tar).firstmember is not None or tar.pax_headers:  # those of all further members
            return None
        at, blocks = tar.offset, self._blocks.peek(tar.offset, self._headers)
        header, place = _USUAL.fullmatch(blocks, 0, _BLOCK), at + _BLOCK
        if header is None or not _has_its_sum(header):
            return None
        if header[4] == b"x":
            size, header, self._headers = int(header[2], 8), None, 3 * _BLOCK
            blocks = self._blocks.peek(at, self._headers) if len(blocks) == _BLOCK else blocks
            if size < _BLOCK:
                time = _TIME.fullmatch(blocks, _BLOCK, _BLOCK + size)
                header = _USUAL.fullmatch(blocks, 2 * _BLOCK) if time is not None and int(time[1]) == size else None
            if header is None or header[4] != b"0" or not _has_its_sum(header):
                return None
            place += 2 * _BLOCK
        size = int(header[2], 8)
        tar.offset = place + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        return PlainFile(header[1].decode(tar.encoding or "utf-8", tar.errors or "surrogateescape"), size, at, place)

    def _damage(self, offset: int) -> DamagedTar:
        if self._blocks.cut:
            return DamagedTar(offset, "its end", cut=True)
        return DamagedTar(offset, "a damaged header" if offset else "no header of a tar")

    def _check_end(self, end: int) -> None:
        """Check that the tar holds zeros alone from offset `end` on. `tarfile` has just read the block there."""
        blocks = self._blocks
        if blocks.cut:
            raise self._damage(end)
        if blocks.last.strip(b"\0") or blocks.tell() != end + tarfile.BLOCKSIZE:
            raise self._damage(end)
        blocks.whole = True
        while content := blocks.read(_CHUNK):
            if zeros := content.lstrip(b"\0"):
                raise DamagedTar(blocks.tell() - len(zeros), "bytes after the block of zeros that ends a tar")
        if blocks.tell() - end > _ZEROS:
            raise DamagedTar(end, f"{blocks.tell() - end} bytes of zeros", cut=True)


def _has_its_sum(header: re.Match[bytes]) -> bool:
    """True if a header has its checksum, the sum of its bytes with blanks in place of the checksum itself."""
    block = header[0]
    found = (zlib.adler32(block) & 0xFFFF) - 1  # the sum modulo 65521
    return (found - sum(block[148:156]) + 8 * ord(" ") - int(header[3], 8)) % 65521 == 0


class _Blocks:
    """File object for `tarfile` that remembers the bytes read last and whether the file ended within them.

    Raises DamagedTar where the compression of the file is damaged.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, max(most, _CHUNK)
        self.last, self.cut, self.whole = b"", False, False
        self._seen, self._seen_at, self._at = b"", 0, 0  # what `peek` has read, its place, and the place of this file

    def peek(self, place: int, size: int) -> bytes:
        """Up to `size` bytes from offset `place` on, which can then be read once more, as can the byte before them."""
        begin = place - 1  # as `tarfile` does, to see whether the member before is whole
        if begin != self._seen_at:
            self._seen, self._seen_at = b"", begin
            self._seek(begin)
        if len(self._seen) <= size:
            self._seen += self._read(size + 1 - len(self._seen))
        self._at = place
        return self._seen[1 : size + 1]

    def read(self, size: int) -> bytes:
        if size > self._most:
            raise tarfile.ReadError("header is too long")
        begin = self._at - self._seen_at
        if 0 <= begin < len(self._seen):
            self.last = self._seen[begin : begin + size]
            if len(self.last) < size:
                self.last += self._read(size - len(self.last))
        else:
            if self._file.tell() != self._at:
                self._seek(self._at)
            self.last = self._read(size)
        self._at += len(self.last)
        self.cut = len(self.last) < size
        return self.last

    def seek(self, place: int) -> None:
        self._at = place

    def tell(self) -> int:
        return self._at

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except _UNPACKING as error:
            raise self._damage(error) from None

    def _seek(self, place: int) -> None:
        try:
            self._file.seek(place)
        except _UNPACKING as error:
            raise self._damage(error) from None

    def _damage(self, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk or the network; gzip's have none
            return error
        cut = isinstance(error, EOFError)
        found = "the end of compressed data" if cut else "damaged compressed data"
        return DamagedTar(self._file.tell(), found, cut=cut, whole=self.whole)
