"""File writes that survive a crash of the machine."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk. A failed write, as on a full disk, leaves no file.

    Names that are not UTF-8, as Python reads them from a tar, are written as the bytes that they were.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        sync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def make_no_older(path: Path, sources: Iterable[Path]) -> None:
    """Give a file at least the time of what it was made of, which another machine's clock may have put ahead."""
    newest = max((source.stat().st_mtime_ns for source in sources), default=0)
    if newest > path.stat().st_mtime_ns:
        os.utime(path, ns=(newest, newest))


@contextmanager
def replaced_durably(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of `path` when the `with` block ends.

    It is written aside as `path` with the suffix `.tmp`, so `path` is whole or absent at any moment. After an error it
    is removed, and `path` is as before.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("w+b") as file:
            yield file
        sync_file(aside)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
