"""Interface between sources and the build: a `Source` has `Piece`s, and a piece yields `Record`s.

To add a source, write a function that returns a `Source` and decorate it with `source`. `cut_into_pieces` makes pieces
of listed records. A format with large files gets its own class of `Piece`, which reads one file. The other functions
are helpers of all sources.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from io import BufferedReader
from pathlib import Path
from typing import Any, ParamSpec, Protocol

from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.files import sha256
from mvlm_dataloading.images.decode import decode
from mvlm_dataloading.images.limits import ImageLimits
from mvlm_dataloading.untrusted import check_links, open_regular
from mvlm_dataloading.urls import require_local

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ImageStrip:
    """Images side by side as one image, for questions about a pair or a row of images.

    Of n images it has height S and width n S. It is composed when the sample is written.
    """

    files: tuple[Path, ...]
    """File of each image. The same file may be named several times, with other boxes."""
    side: int
    """S in pixels. Each image, or its part in the box, is resized to S x S, whatever its shape."""
    boxes: tuple[Box, ...] = ()
    """Part of each image to take, (left, top, right, bottom) in pixels. Default: the whole images."""
    kind: str = "JPEG"
    """Format of the strip: JPEG, at quality 90, or PNG."""

    def compose(self, contents: Sequence[bytes], limits: ImageLimits) -> bytes:
        """Encode the strip from the contents of its files. Images are turned as their EXIF data say.

        Raises:
            DataError: an image is beyond the limits, is damaged, or has no such part.
        """
        pil = need("PIL.Image")
        strip = pil.new("RGB", (self.side * len(contents), self.side))
        for place, content in enumerate(contents):
            image = decode(content, limits).image()
            if self.boxes:
                right, lower = self.boxes[place][2:]
                if right > image.width or lower > image.height:  # Pillow would fill the rest with black
                    size = f"{image.width} x {image.height}"
                    raise DataError(f"wanted an image with the part {self.boxes[place]}, found one of {size}")
                image = image.crop(self.boxes[place])
            if image.size != (self.side, self.side):
                image = image.resize((self.side, self.side), pil.Resampling.BICUBIC, reducing_gap=3.0)
            strip.paste(image, (place * self.side, 0))
        file = io.BytesIO()
        strip.save(file, self.kind, quality=90)
        return file.getvalue()


# DALI takes everything after the first dot of a name as its extension, and splits index lines at blanks.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_+=@,-]{1,80}")
BAD_KEY = "key is not 1 to 80 of A-Z a-z 0-9 _ + = @ , -"

# Names of published splits -> ours. COCO's `restval` is used for training, as is standard with Karpathy's splits.
_SPLITS = {"train": "train", "training": "train", "restval": "train"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing"), "test")
EVALUATION_SPLITS = ("validation", "test")
"""Evaluation splits that every data set may have. A data set may have more: see `is_evaluation`."""

_FINGERPRINTED = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """An image and its captions, as published."""

    key: str
    """Identifies the sample. Must match KEY_PATTERN and be unique in the data set, else the record is rejected."""
    image: Path | bytes | ImageStrip | None
    """The encoded image, its file, or several files side by side; None for a record without an image."""
    captions: Sequence[str]
    where: str
    """Origin of the record, for messages and `rejected.jsonl`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """Reason for which the source rejects the record, or None."""


class Piece(Protocol):
    """Unit of parallel and resumable work: part of one split, read by one worker. Must be picklable."""

    @property
    def split(self) -> str: ...

    @property
    def label(self) -> str:
        """Identifies the piece. A resumed build must have the labels of the unfinished one."""
        ...

    def records(self, max_bytes: int) -> Iterator[Record]:
        """Yield the records in a fixed order. An image above `max_bytes` may be skipped with the fault `TOO_LARGE`."""
        ...


@dataclass(frozen=True, slots=True)
class ListedPiece:
    """A piece whose records are listed in advance."""

    split: str
    listed: Sequence[Record]

    @property
    def label(self) -> str:
        return f"{self.split} {len(self.listed)} from {self.listed[0].key} to {self.listed[-1].key}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        return iter(self.listed)


@dataclass(frozen=True, slots=True)
class Source:
    """A published data set: its origin, and its pieces in a fixed order."""

    name: str
    origin: str
    """Place or publication that it comes from: the field `source` of dataset.json."""
    licence: str
    recipe: dict[str, Any]
    """All values that determine the content, except build options."""
    pieces: Sequence[Piece]
    attribution: str = ""
    questions: bool = False
    """True for a task's data set, where several samples may have one image. Equal images are then no duplicates, and
    the published splits stay as they are."""


P = ParamSpec("P")
SOURCES: dict[str, Callable[..., Source]] = {}
"""Registered sources by their names on the command line; `mvlm_dataloading.sources.all_sources` fills it."""


def source(function: Callable[P, Source]) -> Callable[P, Source]:
    """Register a function as a source, with its name in hyphens as the name of `mvlm data NAME`.

    Its parameters become the command's: those before `/` stand alone, the others are flags. Its docstring is the help,
    with a line for each parameter under `Args:`, but for `Raises:`. Every source raises DataError for a file or folder
    that is missing, is a URL or has another format, and for a folder with a link that leaves it.

    NOTE: links are checked in arguments that are folders. A source that finds images beside a file has to call
    `check_links` for their folder, or foreign data may name any file of the machine.
    """

    @wraps(function)
    def checked(*arguments: P.args, **settings: P.kwargs) -> Source:
        for value in (*arguments, *settings.values()):
            for path in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(path, Path):
                    continue
                require_local(path)
                if path.is_dir():
                    check_links(path)
        return function(*arguments, **settings)

    SOURCES[function.__name__.replace("_", "-")] = checked
    return checked


PIECE_RECORDS = 2048


def cut_into_pieces(records: dict[str, list[Record]]) -> list[Piece]:
    """Divide the records of each split into pieces."""
    return [
        ListedPiece(split, listed[begin : begin + PIECE_RECORDS])
        for split, listed in sorted(records.items())
        for begin in range(0, len(listed), PIECE_RECORDS)
    ]


def published(
    name: str,
    records: dict[str, list[Record]],
    files: Sequence[Path],
    *,
    origin: str,
    licence: str,
    attribution: str,
    questions: bool = False,
    **recipe: Any,
) -> Source:
    """Make a source from records that were read from annotation files.

    Args:
        records: by split.
        files: the annotation files. Their hashes are in the recipe.
        questions: True for a task's questions; the records of one image are then put next to each other.
        recipe: further values that determine the content.
    """
    if questions:
        records = {split: with_images_together(listed) for split, listed in records.items()}
    recipe = {"annotations": [file_sha256(file) for file in files], **recipe}
    return Source(name, origin, licence, recipe, cut_into_pieces(records), attribution, questions)


def with_images_together(records: list[Record]) -> list[Record]:
    """The records with those of one image next to each other. Images keep the order in which they first occur.

    Records of one image then are in the same tar, which stores the image once.
    """
    first: dict[Any, int] = {}
    for record in records:
        first.setdefault(record.image, len(first))
    return sorted(records, key=lambda record: first[record.image])


def is_evaluation(split: str) -> bool:
    """True for every split but the training split."""
    return split != "train"


def canonical_split(name: object, where: str, remedy: str = "rename it") -> str:
    """Map a published split name to train, validation or test. Raises DataError for an unknown name, or for none."""
    found = _SPLITS.get(name.strip().lower()) if isinstance(name, str) else None
    if found is None:
        raise DataError(f"{where}: wanted a split named {', '.join(sorted(_SPLITS))}, found {name!r}; {remedy}")
    return found


def looks_like_evaluation(word: str) -> bool:
    """True for a word in lower case that names an evaluation split, known or not, such as testa or minival."""
    return re.fullmatch(r"(mini)?(test|val|valid|dev|eval|evaluation|hidden)(dev|std|[a-c]|\d+)*", word) is not None


def split_in_name(name: str) -> str | None:
    """First word of a file or folder name that names a split, in lower case; None if there is none.

    A word consists of letters. A known name (train of cc3m-train-000.tar, val of val2017) comes before one that only
    looks like an evaluation split (testa of testA-000.tar). `canonical_split` refuses the latter, so that it does not
    become training data.
    """
    words = re.findall("[a-z]+", name.lower())
    known = (word for word in words if word in _SPLITS)
    return next(known, None) or next((word for word in words if looks_like_evaluation(word)), None)


def safe_key(name: str) -> str:
    """Convert a name to a valid key. A valid name is kept; else characters are replaced and a hash is appended."""
    if KEY_PATTERN.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_+=@,-]+", "_", name)[:60].strip("_")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{plain}-{digest}" if plain else digest


def split_by_hash(key: str, validation: float, test: float) -> str:
    """Split of an image by a hash of its key, for data sets without splits. More images do not change it."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Check the shares of the evaluation splits. A sum of 1 leaves no image for train. Raises DataError."""
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise DataError(
            f"validation and test: wanted shares from 0 to 1 that sum to at most 1, got {validation} and {test}"
        )


def file_sha256(path: Path) -> str:
    """Hash of a file, for a recipe: another annotation file gives another data set."""
    return sha256(require_file(path))


def file_fingerprint(path: Path, file: BufferedReader | None = None) -> list[Any]:
    """Name, size, and hash of the first and last 64 KiB of a file, for a recipe. For files too large to hash whole.

    Args:
        file: the open file, whose position changes. Default: the file is opened.
    """
    if file is None:
        with open_regular(path) as file:
            return file_fingerprint(path, file)
    file.seek(0)
    head, size = file.read(_FINGERPRINTED), os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _FINGERPRINTED))
    return [path.name, size, hashlib.sha256(head + file.read(_FINGERPRINTED)).hexdigest()]


def records_sha256(pieces: Sequence[Piece]) -> str:
    """Hash of the records of all `ListedPiece`s, for a recipe: their text and the sizes of their images.

    Paths of images are left out, so that a moved folder is the same input. Their bytes are left out to save time.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        last, size = None, None
        for one in piece.listed if isinstance(piece, ListedPiece) else ():
            if one.image is not last:  # asks the disk once for an image with many questions
                last, size = one.image, _image_size(one.image)
            known = [piece.split, one.key, list(one.captions), one.metadata, one.fault, size]
            digest.update(json.dumps(known).encode())
    return digest.hexdigest()


def _image_size(image: Path | bytes | ImageStrip | None) -> Any:
    if isinstance(image, ImageStrip):
        return [image.side, image.boxes, *map(_image_size, image.files)]
    if not isinstance(image, Path):
        return None if image is None else len(image)
    try:
        return image.stat().st_size
    except (OSError, ValueError):  # the file is missing; a name with a NUL raises ValueError
        return None


def require_file(path: Path) -> Path:
    """The path, if it is a file. Raises DataError if not."""
    if not path.is_file():
        raise DataError(
            f"{path}: wanted a file, found none; check the path, or give the folder that the data set was unpacked to"
        )
    return path


def require_one_of(*paths: Path) -> Path:
    """The first of the files that exists. Raises DataError for the first one if none does."""
    return require_file(next((path for path in paths if path.is_file()), paths[0]))


def require_folder(*paths: Path) -> Path:
    """The first of the folders that exists. Raises DataError if none does."""
    found = next((path for path in paths if path.is_dir()), None)
    if found is None:
        names = " or ".join(map(str, paths))
        what = "a file" if any(path.exists() for path in paths) else "none"
        raise DataError(
            f"{names}: wanted a folder, found {what}; give the folder of the images or of the unpacked data set"
        )
    return found
