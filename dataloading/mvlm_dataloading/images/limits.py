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
    """Limits of an image of a data set. Its memory follows from its pixels, its sides from the largest aspect."""
    return ImageLimits(max_bytes, max_pixels, max_side=max_pixels, max_memory=None)


MAX_BLOCKS = 1_000
"""Chunks, segments, extensions or tags of one file beside its pixels. A photograph has about ten."""
MAX_PARTS = 100_000
"""Chunks of a PNG, or strips or tiles of a TIFF, that hold its pixels."""
MAX_SCANS = 100
LEAST_SCANS, MAX_SCANNED = 20, 1_000_000_000
"""Scans of a JPEG: MAX_SCANS, but of a large one as many as decode MAX_SCANNED pixels, and LEAST_SCANS at least.
A progressive one has about ten, and each takes nearly as long as a whole image."""
MAX_RUN_BYTES = 4_000_000
"""File size of a BMP with run lengths, which Pillow decodes in Python."""


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
    """An image that is not used. The message has no name of the image: a caller puts it in front.

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
    """The error for content that is not the image that it should be."""
    return ImageRefusedError(kind, f"wanted an image, could not read it: {reason}; use a PNG, JPEG or WebP")
