"""Options for building data sets and views. Imports no slow package."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvlm_dataloading.images.limits import MAX_PIXELS

from .errors import DataError

# Field names are stored in a data set's recipe. After a rename, finished data sets would look different. Docstrings are
# the text of `mvlm data ... --help`.


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of a build: image processing, caption processing, rejection limits."""

    short_side: int | None = None
    """Downscale images to this short side, in pixels. Smaller images are never upscaled."""
    quality: int | None = None
    """Re-encode every image as a JPEG of this quality. Default: only downscaled images, at quality 90."""
    max_pixels: int = 50_000_000
    """Maximum width x height, read from the header before the image is decoded."""
    min_side: int = 16
    """Minimum short side in pixels."""
    max_aspect: float = 10.0
    """Maximum ratio of long side to short side."""
    max_image_bytes: int = 64 << 20
    """Maximum size of an image file."""
    max_caption_bytes: int = 2000
    """Drop captions above this many bytes of UTF-8. An image with no other caption is rejected."""
    max_captions: int | None = None
    """Keep at most this many captions per image, the first ones."""
    shard_bytes: int = 256 << 20
    """Maximum size of a tar."""
    drop_duplicates: bool = False
    """Drop images whose file equals that of an earlier image in the same split."""
    tokenizer: Path | None = None
    """A tokenizer.json: store token ids with the captions."""
    text_length: int = 40
    """Maximum tokens of a stored caption, including [CLS] and [SEP]. Used only with a tokenizer."""

    def check(self) -> None:
        """Check the ranges of all options. Raises DataError."""
        for name, low, high in (
            ("short_side", 16, 65500), ("quality", 1, 100), ("max_pixels", 1, MAX_PIXELS), ("min_side", 1, 65500),
            ("max_aspect", 1, 65500), ("max_image_bytes", 1, 1 << 31), ("max_caption_bytes", 1, 1 << 20),
            ("max_captions", 1, 1 << 20), ("shard_bytes", 10240, 1 << 40), ("text_length", 3, 1 << 20),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name.replace('_', '-')}: wanted {low} to {high}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """Options of a view: selection of its samples."""

    splits: tuple[str, ...] = ()
    """Splits to take. Default: all."""
    min_side: int = 1
    """Minimum short side in pixels."""
    max_aspect: float = float("inf")
    """Maximum ratio of long side to short side."""
    min_words: int = 1
    """Minimum words in every caption."""
    max_words: int = 1 << 20
    """Maximum words in every caption."""
    match: str | None = None
    """Regular expression that at least one caption must contain."""
    without: str | None = None
    """Regular expression that no caption may contain."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Duplicates to drop within a split: `keep` (none), `exact` (identical files), `near` (perceptual near-duplicates
    too)."""
    leaks: Literal["drop", "keep"] = "drop"
    """Training images that are in an evaluation split, or nearly: `drop` them, or `keep` them."""
    fraction: float = 1.0
    """Fraction of the training samples to take, chosen by a hash of the key. Smaller fractions are subsets of larger
    ones."""
    seed: int = 0
    """Seed for choosing the fraction, and the additional copies of a fractional weight."""

    def check(self) -> None:
        """Check the options. Raises DataError."""
        if not 0 < self.fraction <= 1:
            raise DataError(f"fraction: wanted more than 0 and at most 1, got {self.fraction}")
        for name in ("match", "without"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise DataError(f"{name}: wanted a regular expression, got {getattr(self, name)!r}: {error}") from None
