"""What a user can set when shards are written and when a view is chosen. Imports nothing that takes time."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import DataError

MAX_PIXELS = 89_478_485
"""Beyond this Pillow takes any picture for a bomb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What becomes of pictures and captions, and what is refused."""

    short_side: int | None = None
    """Pictures with a longer short side are made smaller, to this many pixels; none is ever made larger."""
    quality: int | None = None
    """Encode every picture anew as a JPEG of this quality. Not given: only those made smaller, at 90."""
    max_pixels: int = 50_000_000
    """Width times height, read from the header before anything is decoded."""
    min_side: int = 16
    """Pixels of the shorter side at least."""
    max_aspect: float = 10.0
    """Longer side over shorter side at most."""
    max_image_bytes: int = 64 << 20
    """Size of a picture's file at most."""
    max_caption_bytes: int = 2000
    """A longer caption is left out; a picture with no other is refused."""
    max_captions: int | None = None
    """Captions of a picture to keep at most, the first ones."""
    shard_bytes: int = 256 << 20
    """A new tar is begun when the current one would grow past this."""
    drop_duplicates: bool = False
    """Leave out pictures whose file is equal to that of an earlier one in the same split."""
    tokenizer: Path | None = None
    """A tokenizer.json, to store token ids beside the captions."""
    text_length: int = 40
    """Tokens of a caption at most, [CLS] and [SEP] counted; only with a tokenizer."""

    def check(self) -> None:
        """Raises DataError for a setting that cannot be."""
        for name, low, high in (
            ("short_side", 16, 65500), ("quality", 1, 100), ("max_pixels", 1, MAX_PIXELS), ("min_side", 1, 65500),
            ("max_aspect", 1, 65500), ("max_image_bytes", 1, 1 << 31), ("max_caption_bytes", 1, 1 << 20),
            ("max_captions", 1, 1 << 20), ("shard_bytes", 10240, 1 << 40), ("text_length", 3, 1 << 20),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name.replace('_', '-')}: wanted {low} to {high}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which samples a view takes."""

    splits: tuple[str, ...] = ()
    """Splits to take; all of them when not given."""
    min_side: int = 1
    """Pixels of the shorter side at least."""
    max_aspect: float = float("inf")
    """Longer side over shorter side at most."""
    min_words: int = 1
    """Words of every caption at least."""
    max_words: int = 1 << 20
    """Words of every caption at most."""
    match: str | None = None
    """A regular expression that one of the captions has to contain."""
    without: str | None = None
    """A regular expression that no caption may contain."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Leave out pictures that are there before in the same split: no, equal files, or near-duplicates too."""
    fraction: float = 1.0
    """Share of the training samples to take, by a hash of the key: a smaller share is part of a larger one."""
    seed: int = 0
    """Chooses the share, and what comes once more where a weight is no whole number."""

    def check(self) -> None:
        """Raises DataError for a setting that cannot be."""
        if not 0 < self.fraction <= 1:
            raise DataError(f"fraction: wanted more than 0 and at most 1, got {self.fraction}")
        for name in ("match", "without"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise DataError(f"{name}: wanted a regular expression, got {getattr(self, name)!r}: {error}") from None
