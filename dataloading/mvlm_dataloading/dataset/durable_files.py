"""File writes that survive a crash of the machine."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk. A failed write, as on a full disk, leaves no file."""
    try:
        path.write_text(text, encoding="utf-8")
        sync_file(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


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
