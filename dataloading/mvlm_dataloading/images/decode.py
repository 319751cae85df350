"""Decoding of untrusted images: files, bytes and PIL images, refused by their headers or decoded within limits."""

import errno
import io
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import MissingPackageError, need
from mvlm_dataloading.untrusted import irregular

from .colours import RgbRows
from .headers import ImageHeader, png_data, read_image_header
from .limits import ImageLimits, ImageRefusedError, unreadable

_DEFLATE = 1032  # most bytes that one byte of deflate stands for
_BLOCK, _READ = 1 << 18, 1 << 20


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
    while left and (part := os.read(number, min(left, _READ))):
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


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Refuse an image by its sides. Raises ImageRefusedError."""
    size = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise ImageRefusedError("pixels", f"wanted at most {limits.max_pixels} pixels, found {size}; make it smaller")
    if max(width, height) > limits.max_side:
        raise ImageRefusedError(
            "side", f"wanted sides of at most {limits.max_side} pixels, found {size}; make it smaller"
        )


def check_memory(width: int, height: int, needed: float, limits: ImageLimits) -> None:
    """Refuse an image by the bytes that decoding and resizing it take. Raises ImageRefusedError."""
    most = limits.max_memory
    if most is not None and needed > most:
        found = f"{width} x {height} pixels that take {needed / 1e6:.0f} MB"
        raise ImageRefusedError(
            "memory",
            f"wanted an image that takes at most {most / 1e6:g} MB of memory, found {found}; make it smaller",
        )


def check_image(content: bytes, limits: ImageLimits, *, further: int = 0, may_shrink: bool = False) -> ImageHeader:
    """Read the header of an encoded image and check that it may be decoded within the limits. Nothing is decoded.

    Returns the header; its `part` says at which fraction of the sides to decode.

    Args:
        further: bytes of memory per pixel of the longer side that the caller takes besides, to resize the image.
        may_shrink: a JPEG that would take too much memory may be decoded at 1/2, 1/4 or 1/8 of its sides.

    Raises:
        ImageRefusedError: the file is no image within the limits.
    """
    if not content:
        raise unreadable("it is empty", "empty")
    if len(content) > limits.max_bytes:
        raise too_many_bytes(limits.max_bytes, len(content))
    header = read_image_header(content)
    if header.kind not in limits.kinds:
        raise ImageRefusedError("format", f"wanted {', '.join(limits.kinds)}, found {header.kind}; convert it")
    check_size(header.width, header.height, limits)
    if header.raw_bytes > _DEFLATE * (header.data_bytes + 1):
        raise unreadable(f"{len(content)} bytes cannot hold {header.width} x {header.height} pixels")
    if not may_shrink:
        check_memory(header.width, header.height, header.memory(1) + further * max(header.width, header.height), limits)
        return header if header.part == 1 else header._replace(part=1)
    parts = (1, 2, 4, 8) if header.kind == "JPEG" else (1,)
    needed = {part: header.memory(part) + further * -(-max(header.width, header.height) // part) for part in parts}
    most = limits.max_memory
    part = next((part for part in parts if most is None or needed[part] <= most), 1)
    check_memory(header.width, header.height, needed[part], limits)
    return header if part == header.part else header._replace(part=part)


def decode(
    image: str | Path | bytes | Any, limits: ImageLimits, *, further: int = 0, may_shrink: bool = False
) -> RgbRows:
    """Decode an image within the limits. Its rows are converted to RGB when they are asked for.

    Args:
        image: a path, the bytes of a file, or a PIL image, which may be opened and not yet decoded.
        further, may_shrink: as for `check_image`.

    Raises:
        ImageRefusedError: the file is no regular one, or is no whole image within the limits.
    """
    pil, file = need("PIL.Image"), need("PIL.ImageFile")
    try:
        if isinstance(image, pil.Image):
            width, height = image.size  # pyright: ignore[reportAttributeAccessIssue]
            own = 4 * width * height if isinstance(image, file.ImageFile) else 0  # else it is decoded
            check_size(width, height, limits)
            check_memory(width, height, own + further * max(width, height), limits)
            return RgbRows(image)
        content = image if isinstance(image, bytes) else read_image_file(image, limits.max_bytes)
        header = check_image(content, limits, further=further, may_shrink=may_shrink)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which the limits judge, and of damaged metadata
            with pil.open(io.BytesIO(content), formats=(header.kind,)) as opened:
                # Pillow turns a TIFF itself, and says so from the start.
                if sorted(opened.size) != sorted((header.width, header.height)):
                    raise unreadable("its headers state two sizes")
                if header.part > 1:
                    opened.draft(None, (header.width // header.part, header.height // header.part))
                opened.load()
                if header.kind == "PNG" and not _is_whole(opened, content, header):
                    raise unreadable("it ends before its last row")
                return RgbRows(opened)
    except (ImageRefusedError, MissingPackageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        raise unreadable("it is truncated" if "truncated" in str(error) else "it is damaged") from None


def _is_whole(image: Any, content: bytes, header: ImageHeader) -> bool:
    """False for a PNG whose data end before its last row: Pillow gives black rows in the place of the others."""
    width, height = image.size
    if not header.interlaced and image.crop((0, height - 1, width, height)).tobytes().strip(b"\0"):
        return True  # a row that was not decoded is all zeros
    stream, left = zlib.decompressobj(), header.raw_bytes
    for part in png_data(content):
        while part and left > 0:
            left -= len(stream.decompress(part, _BLOCK))
            part = stream.unconsumed_tail
    return left <= 0
