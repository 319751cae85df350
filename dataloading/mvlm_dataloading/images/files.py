"""Content of an image file, if it is a regular file of bounded size."""

import errno
import os
from pathlib import Path

from mvlm_dataloading.files import irregular

from .limits import ImageRefusedError

_BLOCK = 1 << 20


def read_image_file(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. A pipe, a device, a socket or a folder is never read, nor waited for.

    The bytes are counted as they are read: a file may grow, and its stated size may be untrue.

    Raises:
        ImageRefusedError: there is no such file, it is not a regular one, it cannot be read, or it is too large.
    """
    try:
        # Without O_NONBLOCK, a pipe without a writer would block here.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            return _read(number, max_bytes)
        finally:
            os.close(number)
    except ImageRefusedError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name may hold a NUL, or not be encodable
        raise ImageRefusedError("missing", "wanted an image, found no such file; check the path") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise _not_regular("a socket or a device") from None
        reason = (error.strerror or "an error").lower()
        raise ImageRefusedError(
            "unreadable", f"wanted an image file, could not read it: {reason}; check the path"
        ) from None


def _read(number: int, max_bytes: int) -> bytes:
    known = os.fstat(number)
    if found := irregular(known):
        raise _not_regular(found)
    if known.st_size > max_bytes:
        raise too_many_bytes(max_bytes, known.st_size)
    parts, left = [], max_bytes + 1
    while left and (part := os.read(number, min(left, _BLOCK))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise too_many_bytes(max_bytes)
    return b"".join(parts)


def too_many_bytes(most: int, size: int | None = None) -> ImageRefusedError:
    """The error for a file above `most` bytes, of `size` bytes if that is known."""
    found = "more" if size is None else f"{size / 1e6:.1f} MB"
    return ImageRefusedError("bytes", f"wanted at most {most / 1e6:g} MB, found {found}; choose a smaller file")


def _not_regular(found: str) -> ImageRefusedError:
    return ImageRefusedError("file", f"wanted an image file, found {found}; give a regular file")
