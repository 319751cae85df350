"""Scan of a linked file: the records of its usable samples, which are all that a link stores of them.

A record has 3 + 2 k columns, uint32, for k files of captions (`CaptionSpec.files`):

    image       of a tar the block of 512 bytes at which its file begins; of a table the number of the row
    image size  bytes of the image's file
    text, size  for each file of captions in a tar, its block and its size; 0 and ABSENT where there is none
    key end     end of the sample's key among the keys of the shard

A record and its key have at most `SAMPLE_BYTES`; longer keys keep their end. A sample is left out, and counted by its
reason, if it has no caption or no image, or if the image's header, its end or the checksums of a PNG say that it cannot
be decoded.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.sample_index import ABSENT
from mvlm_dataloading.images.decode import check_image
from mvlm_dataloading.images.limits import ImageRefusedError, limits_of_build

from .captions import CaptionSpec

SAMPLE_BYTES = 56
"""Most bytes of a record and its key. The table of shards has 24 for each shard."""
MAX_IMAGE = 64 << 20
"""Largest file of an image."""
MAX_PIXELS = 50_000_000
_LIMITS = limits_of_build(MAX_PIXELS, MAX_IMAGE)
NO_TEXT: tuple[int, int] = (0, ABSENT)
_NEEDED = (b"IHDR", b"PLTE", b"IDAT")
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """Settings of a scan."""

    captions: CaptionSpec
    image: str = ""
    """Extension of the images in tars, or their column in tables. Default: the only one that there is."""


@dataclass(slots=True)
class Scan:
    """Result of a scan of one file, filled by `add` sample after sample."""

    columns: int
    numbers: "array[int]" = field(default_factory=lambda: array("I"))
    """Records, one after another: lists would keep the garbage collector busy."""
    keys: bytearray = field(default_factory=bytearray)
    captions: int = 0
    """Number of captions of the usable samples."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of other samples, by reason."""
    fields: Counter[str] = field(default_factory=Counter)
    """Number of samples with each file, or column."""
    groups: list[int] = field(default_factory=list)
    """Usable samples of each row group of a table that has some."""
    warning: str = ""

    def add(self, key: str, image: int, size: int, texts: Sequence[tuple[int, int]], captions: int) -> None:
        """Append a usable sample."""
        name = key.encode("utf-8", "surrogateescape")
        self.keys += name[-(SAMPLE_BYTES - 4 * self.columns) :]
        if len(texts) == 1:
            self.numbers.extend((image, size, *texts[0], len(self.keys)))
        else:
            self.numbers.extend((image, size, *chain.from_iterable(texts), len(self.keys)))
        self.captions += captions

    @property
    def records(self) -> NDArray[np.uint32]:
        """uint32 (n, columns)."""
        return np.array(self.numbers, "<u4").reshape(-1, self.columns)


def columns_of(captions: CaptionSpec) -> int:
    """Columns of a record."""
    return 3 + 2 * len(captions.files)


def image_fault(content: Any) -> str | None:
    """The reason for which an image will not be decoded, by its header and its end; None if it may be."""
    image = bytes(content)
    try:
        check_image(image, _LIMITS)
    except ImageRefusedError as refused:
        return refused.reason
    # Some good files have bytes behind their end, so it is looked for in the last quarter.
    end = _ENDS.get(image[:2])
    if end is not None and image.rfind(end, len(image) * 3 // 4) < 0:
        return "image ends early"
    return "image is damaged" if image.startswith(b"\x89P") and not _checksums_fit(image) else None


def _checksums_fit(png: bytes) -> bool:
    """False if a part of a PNG that decoders need has another checksum, for which they refuse it."""
    at, view = 8, memoryview(png)
    while at + 12 <= len(png):
        size, kind = int.from_bytes(view[at : at + 4], "big"), png[at + 4 : at + 8]
        end = at + 8 + size
        if kind in _NEEDED and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        at = end + 4 if kind != b"IEND" else len(png)
    return True
