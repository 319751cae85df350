"""Limits of an untrusted image, and the error for one that is refused."""

import sys
from dataclasses import dataclass

from mvlm_dataloading.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits that hold for one image. All but the bytes are compared with its header, before it is decoded."""

    max_bytes: int = 100_000_000
    """Bytes of the image's file."""
    max_pixels: int = 100_000_000
    """Most pixels, width times height."""
    max_side: int = 65_500
    """Pixels of the longer side: the most that a JPEG can have."""
    max_memory: int | None = 400_000_000
    """Bytes that decoding and resizing it take, its file not counted; None for as many as `max_pixels` allow."""
    kinds: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    """Formats that are allowed, named as `ImageHeader.kind`."""


MAX_PIXELS = 89_478_485
"""Most pixels of an image that a build stores. Above it, Pillow treats an image as a decompression bomb."""


def limits_of_build(max_pixels: int = MAX_PIXELS, max_bytes: int = sys.maxsize) -> ImageLimits:
    """Limits of an image that a build stores.

    Memory and sides have no limits of their own: `max_pixels` bounds the memory, and the largest aspect ratio the
    sides.
    """
    return ImageLimits(max_bytes, max_pixels, max_side=max_pixels, max_memory=None)


MAX_BLOCKS = 1_000
"""Most chunks, segments, extensions or tags of a file that do not hold pixels. A photograph has about ten."""
MAX_PARTS = 100_000
"""Most chunks of a PNG, or strips or tiles of a TIFF, that hold the pixels."""
MAX_SCANS = 100
LEAST_SCANS, MAX_SCANNED = 20, 1_000_000_000
"""Bounds of the number of scans of a JPEG. It may have MAX_SCANS; a large one only as many as decode MAX_SCANNED pixels
together, but at least LEAST_SCANS. A progressive JPEG has about ten, and each takes nearly as long as a whole image."""
MAX_RUN_BYTES = 4_000_000
"""Most bytes of the file of a BMP with run-length compression, which Pillow decodes in Python."""


UNDECODABLE = "image cannot be decoded"
TOO_MANY_PIXELS = "image has too many pixels"
TOO_LARGE = "image file is too large"
EMPTY = "image file is empty"
_REASONS = {
    "pixels": TOO_MANY_PIXELS, "bytes": TOO_LARGE, "blocks": "image has too many blocks, scans or tags",
    "missing": "image file is missing", "file": "image file is missing", "empty": EMPTY,
    "unreadable": "image file cannot be read",
}  # fmt: skip


class ImageRefusedError(DataError):
    """An image is refused. The message does not name the image: a caller puts the name in front.

    Attributes:
        kind: "missing", "file" (not a regular one), "unreadable", "bytes", "empty", "format", "pixels", "side",
            "memory", "blocks" or "damaged".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def reason(self) -> str:
        """The reason as in `rejected.jsonl`, where equal reasons are counted."""
        return _REASONS.get(self.kind, UNDECODABLE)


def unreadable(reason: str, kind: str = "damaged") -> ImageRefusedError:
    """The error for content that cannot be read as an image."""
    return ImageRefusedError(kind, f"wanted an image, could not read it: {reason}; use a PNG, JPEG or WebP")
