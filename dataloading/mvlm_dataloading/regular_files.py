"""Opening of files that others may have put there: regular files alone, never waited for, and unchanged while read."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from mvlm_dataloading.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def irregular(status: os.stat_result) -> str | None:
    """What a status is of, in words, if it is of no regular file; else None."""
    return None if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise DataError if a path, whose status is given, is a folder, pipe, socket or device."""
    if found := irregular(status):
        raise DataError(f"{path}: wanted a file, found {found}; put the file there, or remove what is there")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, at once. Opening a pipe would wait for ever, opening a device may act on it.

    Raises:
        DataError: it is no regular file.
        OSError: it is missing or cannot be read.
    """
    require_regular(path, os.stat(path))
    # It may have been replaced since; O_NONBLOCK changes nothing for a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Content of a regular file. Raises as `open_regular`, and DataError if it has more than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DataError(f"{path}: wanted at most {limit} bytes, found {size}; restore it")
        return file.read()


@contextmanager
def opened_unchanged(path: Path) -> Iterator[BufferedReader]:
    """An open regular file, which must stay as it is while the `with` block reads it.

    What is read more than once inside the block, to hash it for example, is then the same each time.

    Raises:
        DataError: it is no regular file; at the end, in place of any error of the block too: its size, its time or its
            place on the disk has changed, or another file has its name.
        OSError: it is missing or cannot be read.
    """
    with open_regular(path) as file:
        before = _state(os.fstat(file.fileno()))
        try:
            yield file
        except Exception:
            _compare(path, file, before)
            raise
        _compare(path, file, before)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _compare(path: Path, file: BufferedReader, before: tuple[int, int, int, int]) -> None:
    try:
        found = {_state(os.fstat(file.fileno())), _state(os.stat(path))}
    except OSError:
        found = set()
    if found != {before}:
        raise DataError(
            f"{path}: wanted a file that stays as it is while it is read, found that it changed; start over when "
            "nothing writes it any more"
        ) from None
