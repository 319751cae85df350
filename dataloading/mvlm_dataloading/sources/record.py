"""What a source of image-text pairs hands over: records, in pieces that a process can work through on its own."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mvlm_dataloading.errors import DataError

# DALI takes everything after the first dot of a name for its extension, and splits index lines at blanks.
KEY = re.compile(r"[A-Za-z0-9_+=@,-]{1,80}")

# What published data sets call their splits, and what ours are called. COCO's `restval` is trained on by everybody.
_SPLITS = {"train": "train", "training": "train", "restval": "train"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation") | dict.fromkeys(
    ("test", "testing"), "test"
)
EVALUATION_SPLITS = ("validation", "test")

_TRACED = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """One picture and its captions, as published."""

    key: str
    """Unique in the data set, and a `KEY`."""
    image: Path | bytes | None
    """The encoded picture or its file, or None where the source has none."""
    captions: Sequence[str]
    where: str
    """The file that it comes from, for messages."""
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """Why the source itself refuses it."""


class Piece(Protocol):
    """A part of one split, at most a few thousand records. Pickled, and read in another process."""

    @property
    def split(self) -> str: ...

    @property
    def label(self) -> str:
        """What tells this piece from another, to see whether a resumed run means the same."""
        ...

    def records(self, max_bytes: int) -> Iterator[Record]:
        """The records in a fixed order. A picture of more than `max_bytes` need not be read: `TOO_LARGE`."""
        ...


TOO_LARGE = "image file is too large"


@dataclass(frozen=True, slots=True)
class Listed:
    """A piece whose records the source knows beforehand."""

    split: str
    listed: Sequence[Record]

    @property
    def label(self) -> str:
        return f"{self.split} {len(self.listed)} from {self.listed[0].key} to {self.listed[-1].key}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        return iter(self.listed)


@dataclass(frozen=True, slots=True)
class Source:
    """A published data set: where it comes from, and its pieces in order."""

    name: str
    origin: str
    licence: str
    recipe: dict[str, Any]
    """What the content is a function of, besides the settings of the writer."""
    pieces: Sequence[Piece]
    attribution: str = ""


PIECE_RECORDS = 2048


def cut(records: dict[str, list[Record]], size: int = PIECE_RECORDS) -> list[Piece]:
    """The records of each split in pieces of `size`."""
    return [
        Listed(split, listed[begin : begin + size])
        for split, listed in sorted(records.items())
        for begin in range(0, len(listed), size)
    ]


def split_name(name: str, where: str) -> str:
    """Our name of a published split. Raises DataError for one that is not known."""
    found = _SPLITS.get(name.strip().lower())
    if found is None:
        raise DataError(f"{where}: wanted a split named {', '.join(sorted(_SPLITS))}, found {name!r}; rename it")
    return found


def safe_key(name: str) -> str:
    """The name as a key: itself if it is one, else with other signs replaced and a hash that keeps it unique."""
    if KEY.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_+=@,-]+", "_", name)[:60].strip("_")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain}-{digest}" if plain else digest


def hash_split(key: str, validation: float, test: float) -> str:
    """The split of a picture of a set that comes without splits: by a hash of its key, so that it never changes."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def file_sha256(path: Path) -> str:
    """Goes into a recipe: another annotation file is another data set."""
    with need_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_trace(path: Path) -> list[Any]:
    """The same for a file too large to be read twice: name, size, and the sha256 of its first and last bytes."""
    with path.open("rb") as file:
        head, size = file.read(_TRACED), os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TRACED))
        return [path.name, size, hashlib.sha256(head + file.read()).hexdigest()]


def records_sha256(pieces: Sequence[Piece]) -> str:
    """The same for the records of `Listed` pieces: what is said of them, and the sizes of their pictures.

    Not where the pictures lie, so that a folder which was moved is the same; nor their bytes, which are too many.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        for one in piece.listed if isinstance(piece, Listed) else ():
            told = [piece.split, one.key, list(one.captions), one.metadata, one.fault, _image_size(one.image)]
            digest.update(json.dumps(told).encode())
    return digest.hexdigest()


def _image_size(image: Path | bytes | None) -> int | None:
    if not isinstance(image, Path):
        return None if image is None else len(image)
    try:
        return image.stat().st_size
    except (OSError, ValueError):  # not there; a name with a NUL is a ValueError
        return None


def need_file(path: Path) -> Path:
    """The path of a file. Raises DataError if there is none."""
    if not path.is_file():
        raise DataError(f"{path}: wanted a file, found none; give the folder that the data set was unpacked to")
    return path


def need_folder(*paths: Path) -> Path:
    """The first of the folders that is there. Raises DataError if none is."""
    found = next((path for path in paths if path.is_dir()), None)
    if found is None:
        names = " or ".join(map(str, paths))
        raise DataError(f"{names}: wanted a folder, found none; give the folder that the data set was unpacked to")
    return found
