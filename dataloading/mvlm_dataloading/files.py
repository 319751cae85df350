"""Atomic, durable writes of files and folders, which no link can lead elsewhere.

A file or folder is written aside, forced to the disk and renamed, so it stays after a kill or a power cut. A link that
somebody has put in a folder leads no writer out of it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from .untrusted import open_regular, require_regular, resolve_inside


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a regular file. DataError for another kind of file, OSError if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, to the disk (fsync).

    NOTE: sync a file before it is renamed. After a power cut the disk may hold the new name without the content.
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
def replaced(path: Path, *, within: Path | None = None, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of the file `path` when the `with` block ends, and is then on the disk.

    So `path` is whole, or as before, at any moment. After an error what was written is removed. A link stays a link.
    What is no file, such as a pipe, is written to directly.

    Args:
        within: folder that the file has to lie in, once links are resolved. Default: the user has named the file.
        shared: other threads and processes may write the same file at the same time. A kill then leaves one more file.

    Raises:
        DataError: a link leads out of the folder `within`.
        OSError: the file cannot be written.
    """
    final = Path(os.path.realpath(path)) if within is None else resolve_inside(path, within)
    if within is None and final.exists() and not (final.is_file() or final.is_dir()):
        yield final
        return
    aside = aside_of(final)
    if shared:
        aside = aside.with_name(f"{aside.name}.{os.getpid()}.{threading.get_ident()}")
    with _named(path, aside), _folder(final.parent) as folder:
        try:
            with contextlib.suppress(FileNotFoundError):  # of a kill, or a link that somebody has put there
                os.unlink(aside.name, dir_fd=folder)
            os.close(os.open(aside.name, _NEW, 0o666, dir_fd=folder))
            yield aside
            sync(aside)
            os.rename(aside.name, final.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside.name, dir_fd=folder)
            raise
        os.fsync(folder)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Context with the descriptor of a folder, to open files in it even if its path leads elsewhere later."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _named(path: Path, aside: Path) -> Iterator[None]:
    """Context in which an OSError that names the temporary path `aside` names the user's file `path` instead."""
    try:
        yield
    except OSError as error:
        named = (str(aside), aside.name, str(aside.parent))
        if error.filename is not None and os.fspath(error.filename) in named:
            error.filename, error.filename2 = str(path), None
        raise


def write_file(path: Path, content: str | bytes, *, within: Path | None = None, shared: bool = False) -> None:
    """Write a file by `replaced`.

    Names that are not UTF-8, as Python reads them from a tar, are written as the bytes that they were.
    """
    with replaced(path, within=within, shared=shared) as aside:
        aside.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def open_appended(path: Path, *, within: Path) -> FileIO:
    """Open a file, without a buffer, to read and to append to. It is made if there is none.

    Raises:
        DataError: it is no regular file, or a link leads out of the folder `within`.
        OSError: it cannot be written.
    """
    final = resolve_inside(path, within)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _named(path, final), _folder(final.parent) as folder:
        descriptor = os.open(final.name, flags, 0o666, dir_fd=folder)
    file = FileIO(descriptor, "ab+")
    try:
        require_regular(path, os.fstat(descriptor))
    except BaseException:
        file.close()
        raise
    return file


def make_folder(path: Path, *, within: Path) -> Path:
    """Make a folder, if there is none, and return its place with links resolved. DataError if that leaves `within`."""
    real = resolve_inside(path, within)
    real.mkdir(parents=True, exist_ok=True)
    return real


def write_json(path: Path, value: Any, *, within: Path | None = None) -> None:
    """Write a value as indented JSON by `replaced`, and make the folder if there is none.

    NaN and infinity become null.
    """
    if within is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        make_folder(path.parent, within=within)
    write_file(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n", within=within)


def finite(value: Any) -> Any:
    """A copy of a JSON value in which each float that is NaN or infinite is None."""
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
    """Set the modification time of a file to that of its newest source, if the file is older.

    The clock of another machine may have put a source's time ahead.
    """
    newest = max((source.stat().st_mtime_ns for source in sources), default=0)
    if newest > path.stat().st_mtime_ns:
        os.utime(path, ns=(newest, newest))
