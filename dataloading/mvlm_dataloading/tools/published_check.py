"""Dry check of a published data set: read its files as a build does, write nothing, compare with the published size."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mvlm_dataloading.captions import clean_captions
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.record import KEY_PATTERN, Record, Source
from mvlm_dataloading.sources.strip import ImageStrip
from mvlm_dataloading.sources.tasks.clip_benchmark import clip_benchmark
from mvlm_dataloading.sources.tasks.nlvr import nlvr, nlvr2
from mvlm_dataloading.sources.tasks.refcoco import refcoco
from mvlm_dataloading.sources.tasks.snli_ve import snli_ve
from mvlm_dataloading.sources.tasks.visual_genome_qa import visual_genome_qa
from mvlm_dataloading.sources.tasks.vqa_v2 import vqa_v2

from .published_sizes import OPTIONAL, SIZES, Size

READERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "coco": lambda root, images: coco(root, karpathy if (karpathy := root / "dataset_coco.json").is_file() else None),
    "flickr30k": lambda root, images: flickr30k(root),
    "vqa-v2": vqa_v2,
    "visual-genome-qa": lambda root, images: visual_genome_qa(root),
    "nlvr2": nlvr2,
    "nlvr": lambda root, images: nlvr(root),
    "snli-ve": snli_ve,
    "refcoco": refcoco,
    "clip-benchmark": lambda root, images: clip_benchmark(root),
}
"""Reader of each published data set that can be checked: of its folder, and the folder of its images."""

_IMAGES_INSIDE = ("coco", "flickr30k", "visual-genome-qa", "nlvr", "clip-benchmark")
"""Data sets whose images always lie in the folder itself, so that their readers take no other one."""

_OPTIONS = BuildOptions()


@dataclass(slots=True)
class SplitCount:
    """Counts of one split."""

    rows: int = 0
    texts: int = 0
    images: set[Path | bytes] = field(default_factory=set)
    """Different image files; images in tars by their keys."""
    missing: set[Path] = field(default_factory=set)
    """Image files that are not there."""
    faults: Counter[str] = field(default_factory=Counter)
    """Rows that a build rejects, by reason; those without an image file are in `missing`."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Number of further rows with a key that was used before."""
    published: Size = field(default_factory=lambda: Size(None))


@dataclass(slots=True)
class PublishedCheck:
    """Result of a dry check."""

    name: str
    splits: dict[str, SplitCount]
    problems: list[str]
    """One line per deviation from the published data set."""


def check_published(
    name: str, root: Path, images: Path | None = None, *, subset: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PublishedCheck:  # fmt: skip
    """Read a published data set and compare it with its published size. No image is decoded.

    Args:
        name: one of READERS.
        images: folder of the images, as for the reader.
        subset: fewer rows and images than published are no problem, nor are missing image files.
        progress: called with the number of pieces read and of all pieces.

    Raises:
        DataError: there is no such data set, its files cannot be read, or it takes no other folder of images.
    """
    if name not in READERS:
        raise DataError(f"{name}: wanted one of {', '.join(READERS)}, or the folder of a built data set alone")
    if images is not None and name in _IMAGES_INSIDE:
        raise DataError(f"{name}: its images lie in {root} itself, got --images {images}; leave it out")
    source = READERS[name](root, images)
    edition = _edition(name, root, source)
    counts: dict[str, SplitCount] = {}
    keys: set[str] = set()
    for number, piece in enumerate(source.pieces):
        count = counts.setdefault(piece.split, SplitCount())
        for record in piece.records(_OPTIONS.max_image_bytes):
            _add(count, record, keys)
        progress(number + 1, len(source.pieces))
    for split, count in counts.items():
        count.published = SIZES.get(edition, {}).get(split, Size(None))
    problems = [line for split, count in counts.items() for line in _problems(split, count, subset)]
    absent = SIZES.get(edition, {}).keys() - counts.keys() - set(OPTIONAL.get(edition, ()))
    problems += [] if subset else [f"{split}: wanted the split, found none" for split in sorted(absent)]
    problems += _shared_images(counts) if source.questions else []
    problems += _tar_problems(root) if name == "clip-benchmark" else []
    return PublishedCheck(edition, counts, problems)


def _edition(name: str, root: Path, source: Source) -> str:
    """Key of SIZES: the name, and which of the published splits were found."""
    splits = {piece.split for piece in source.pieces}
    if name == "coco":
        if (root / "dataset_coco.json").is_file():
            return "coco, Karpathy's splits"
        return f"coco, {2014 if (root / 'annotations/captions_train2014.json').is_file() else 2017}"
    if name == "flickr30k":
        return "flickr30k, all images" if splits == {"train"} else "flickr30k, Karpathy's splits"
    return source.name


def _add(count: SplitCount, record: Record, keys: set[str]) -> None:
    count.rows += 1
    count.texts += len(record.captions)
    if record.key in keys:
        count.repeated[record.key] += 1
    keys.add(record.key)
    files = record.image.files if isinstance(record.image, ImageStrip) else (record.image,)
    for file in files:
        if isinstance(file, bytes):
            count.images.add(record.key.encode())
        elif file is not None and file not in count.images:
            count.images.add(file)
            if not _is_file(file):
                count.missing.add(file)
    fault = record.fault
    if fault is None and not KEY_PATTERN.fullmatch(record.key):
        fault = "key is not 1 to 80 of A-Z a-z 0-9 _ + = @ , -"
    if fault is None:
        captions = clean_captions(record.captions, _OPTIONS.max_caption_bytes)
        fault = captions if isinstance(captions, str) else "no image" if record.image is None else None
    if fault is not None:
        count.faults[fault] += 1


def published_table(check: PublishedCheck) -> str:
    """Format the counts as text: a line per split, each number beside the published one."""
    rows = [["split", "rows", "published", "images", "published", "missing", "repeated", "unusable"]]
    for split, count in check.splits.items():
        numbers = [count.rows, count.published.rows, len(count.images), count.published.images, len(count.missing)]
        numbers += [sum(count.repeated.values()), sum(count.faults.values())]
        rows.append([split, *("-" if number is None else f"{number:,}" for number in numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name with a NUL
        return False


def _problems(split: str, count: SplitCount, subset: bool) -> list[str]:
    found = []
    for what, number, published in (
        ("rows", count.rows, count.published.rows),
        ("images", len(count.images), count.published.images),
        ("captions", count.texts, count.published.texts),
    ):
        if published is not None and (number > published or (number < published and not subset)):
            found.append(f"{split}: wanted {published:,} {what} as published, found {number:,}")
    if count.missing and not subset:
        found.append(f"{split}: wanted all image files, found {len(count.missing):,} missing, as {min(count.missing)}")
    if count.repeated:
        rows = sum(count.repeated.values())
        found.append(f"{split}: wanted unique keys, found {rows:,} further rows, as of {min(count.repeated)}")
    found += [f"{split}: {number:,} rows are unusable: {reason}" for reason, number in count.faults.most_common()]
    return found


def _shared_images(counts: dict[str, SplitCount]) -> list[str]:
    """Training images that are in an evaluation split too."""
    train = counts.get("train", SplitCount()).images
    both = {split: train & count.images for split, count in counts.items() if split != "train"}
    return [f"train and {split}: wanted different images, found {len(x):,} in both" for split, x in both.items() if x]


def _tar_problems(root: Path) -> list[str]:
    """Folders whose nshards.txt states another number of tars than there are."""
    found = []
    for file in sorted(root.glob("*/nshards.txt")):
        stated, tars = file.read_text().strip(), len(list(file.parent.glob("*.tar")))
        if stated != str(tars):
            found.append(f"{file.parent.name}: wanted {stated} tars as in nshards.txt, found {tars}")
    return found
