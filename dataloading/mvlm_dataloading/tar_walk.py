"""Walk over a tar that accounts for every block: a member, its padding, or the zeros at the end.

`tarfile` takes a damaged header, and a block of zeros before further members, for the end of the tar. It does not look
at what follows.
"""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, cast

_ZEROS = 4 << 20
"""Most bytes of padding after a tar. Tools pad to a record of 10 KiB, for tapes to 1 MiB. An unfinished download, in a
file whose place on the disk had been reserved, ends with more."""
_CHUNK = 1 << 20
_UNPACKING = (EOFError, OSError, lzma.LZMAError, zlib.error)


class DamagedTar(Exception):
    """A tar with blocks that belong to no member.

    Attributes:
        offset: byte from which on the blocks are not accounted for. In a compressed tar, of its unpacked content.
        found: what is there, for messages.
        cut: True if the file ends there, so that nothing follows that could be lost.
        whole: True if the tar's end was found, and what is damaged is the packing around it.
    """

    def __init__(self, offset: int, found: str, *, cut: bool = False, whole: bool = False) -> None:
        super().__init__(f"{found} at byte {offset}")
        self.offset, self.found, self.cut, self.whole = offset, found, cut, whole


class TarWalk:
    """Members of a tar, from the first block to the last.

    Args:
        file: its content, unpacked, at its beginning. It is read in order, and sought forwards alone.
        most: largest member that `read` is called for, in bytes. It bounds what a header may make this read, too.

    Attributes:
        tar: None before the first member.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._blocks = _Blocks(file, most + tarfile.BLOCKSIZE)
        self.tar: tarfile.TarFile | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
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

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Content of the member that was yielded last. Raises DamagedTar if the tar ends within."""
        assert self.tar is not None
        try:
            file = self.tar.extractfile(member)
            return b"" if file is None else file.read()
        except tarfile.TarError:
            raise self._damage(member.offset) from None

    def _next(self) -> tarfile.TarInfo | None:
        at = 0 if self.tar is None else self.tar.offset
        try:
            if self.tar is None:
                self.tar = tarfile.open(fileobj=cast(BinaryIO, self._blocks), mode="r:")  # noqa: SIM115 (the caller's)
            return self.tar.next()
        # What `tarfile` raises for damaged fields, not only its own errors.
        except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError):
            raise self._damage(at) from None

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


class _Blocks:
    """A file for `tarfile` that remembers what was read last, and whether it ended there.

    Raises DamagedTar where the file's packing is damaged.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, max(most, _CHUNK)
        self.last, self.cut, self.whole = b"", False, False

    def read(self, size: int) -> bytes:
        if size > self._most:
            raise tarfile.ReadError("header is too long")
        try:
            self.last = self._file.read(size)
        except _UNPACKING as error:
            raise self._damage(error) from None
        self.cut = len(self.last) < size
        return self.last

    def seek(self, place: int) -> None:
        try:
            self._file.seek(place)
        except _UNPACKING as error:
            raise self._damage(error) from None

    def tell(self) -> int:
        return self._file.tell()

    def _damage(self, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk or the network; gzip's have none
            return error
        cut = isinstance(error, EOFError)
        found = "the end of compressed data" if cut else "damaged compressed data"
        return DamagedTar(self._file.tell(), found, cut=cut, whole=self.whole)
