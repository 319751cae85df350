"""Files that are written whole, and files of others that are read with care.

Written files and folders stay after a kill or a power cut: they are written aside, synced, renamed. Files that others
may have put there are opened if they are regular files alone, never waited for, and unchanged while they are read.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import DataError


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, to the disk (fsync).

    Sync a file before it is renamed: after a power cut the disk may hold the rename without the content.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside_of(path: Path) -> Path:
    """The path at which `replaced` writes the file `path`; a kill leaves it there, and the next call replaces it."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replaced(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of the file `path` when the `with` block ends, and is then on the disk.

    So `path` is whole, or as before, at any moment. After an error what was written is removed. A link stays a link.
    What is no file, such as a pipe, is written to directly.

    Args:
        shared: other threads and processes may write the same file at the same time. A kill then leaves one more file.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not (final.is_file() or final.is_dir()):
        yield final
        return
    aside = aside_of(final)
    if shared:
        aside = aside.with_name(f"{aside.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield aside
        sync(aside)
        aside.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is not None and os.fspath(error.filename) == str(aside):
            error.filename = str(path)  # the one that the user knows
        raise
    sync(final.parent)


def write_file(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file by `replaced`.

    Names that are not UTF-8, as Python reads them from a tar, are written as the bytes that they were.
    """
    with replaced(path, shared=shared) as aside:
        aside.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON by `replaced`, and make the folder if there is none.

    NaN and infinity become null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for each number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_folder(out: Path, aside: Path) -> Iterator[Path]:
    """The new folder `aside`, which becomes `out` when the `with` block ends, and after an error is removed.

    Its files and its entries are on the disk before the rename. What a killed call left at `aside` is removed first.
    `out` is missing or an empty folder.
    """
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        place_folder(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def place_folder(aside: Path, out: Path) -> None:
    """Rename a folder whose files are on the disk. It replaces an empty folder; OSError for any other."""
    sync(aside)
    aside.rename(out)
    sync(out.parent)


def make_no_older(path: Path, sources: Iterable[Path]) -> None:
    """Give a file at least the time of what it was made of, which another machine's clock may have put ahead."""
    newest = max((source.stat().st_mtime_ns for source in sources), default=0)
    if newest > path.stat().st_mtime_ns:
        os.utime(path, ns=(newest, newest))


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
