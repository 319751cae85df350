"""Duplicate images between training and evaluation splits, or within a split, and the search for near hashes.

Two images are exact duplicates if their published files are equal. They are near-duplicates if their perceptual hashes
differ in at most 3 of 64 bits and their aspect ratios by at most 10 %.

Shape legend: n images.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import read_description
from mvlm_dataloading.dataset.open import open_dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import MAX_PIXELS
from mvlm_dataloading.sources.record import EVALUATION_SPLITS, is_evaluation

from .image_check import ImageDecoder, StoredHeader, on_white, perceptual_hash, read_header

LEAKED = "image is in an evaluation split"
LEAKED_NEARLY = "image is a near-duplicate of one in an evaluation split"
REPEATED = "image is a duplicate"
REPEATED_NEARLY = "image is a near-duplicate"
_MAX_ASPECT_CHANGE = 1.1


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size and hashes of an image."""

    width: int
    height: int
    sha256: bytes
    """Hash of the file as published."""
    phash: int | None
    """Perceptual hash; None for a flat image."""


@dataclass(frozen=True, slots=True)
class ImageTable:
    """Facts of n images, as columns."""

    keys: list[str]
    splits: list[str]
    digest: NDArray[np.bytes_]
    phash: NDArray[np.uint64]
    has_hash: NDArray[np.bool_]
    """(n,): True for an image with a perceptual hash."""
    aspect: NDArray[np.float64]
    """Width over height."""


def parse_image_facts(metadata: Mapping[str, Any]) -> ImageFacts:
    """The facts that a build stores in `<key>.json`. Raises KeyError, TypeError or ValueError if they are missing."""
    known = metadata["phash"]
    width, height = int(metadata["width"]), int(metadata["height"])
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height}")
    return ImageFacts(width, height, bytes.fromhex(metadata["sha256"]), None if known is None else int(known, 16))


def image_facts(dataset: Dataset, i: int, decoder: ImageDecoder) -> ImageFacts:
    """Facts of a sample, from its metadata. They are computed for shards of other tools, which lack them.

    The hash of a transparent image is that of the image on white, as in a build.

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        return parse_image_facts(dataset.metadata(i))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
    image = dataset.image_bytes(i)
    (pixels,) = decoder([image])
    if isinstance(pixels, str):
        raise DataError(f"{dataset.where(i)}: wanted an image, found that {pixels}; leave the sample out")
    header = read_header(image)
    white = on_white(image) if isinstance(header, StoredHeader) and header.has_alpha else None
    pixels = white if isinstance(white, np.ndarray) else pixels
    height, width = pixels.shape[:2]
    return ImageFacts(width, height, hashlib.sha256(image).digest(), perceptual_hash(pixels))


def decoder_with_max_limit() -> ImageDecoder:
    """A decoder with the highest size limit that a build can have, for images of finished data sets."""
    return ImageDecoder(MAX_PIXELS)


def tabulate(facts: Iterable[tuple[str, str, ImageFacts]]) -> ImageTable:
    """Arrange (key, split, facts) of many images as columns."""
    rows = list(facts)
    return ImageTable(
        keys=[key for key, _, _ in rows],
        splits=[split for _, split, _ in rows],
        digest=np.array([one.sha256 for _, _, one in rows], "S32"),
        phash=np.array([one.phash or 0 for _, _, one in rows], np.uint64),
        has_hash=np.array([one.phash is not None for _, _, one in rows], np.bool_),
        aspect=np.array([one.width / one.height for _, _, one in rows], np.float64),
    )


def evaluation_splits(folder: Path) -> list[str]:
    """The evaluation splits of a data set, validation and test first."""
    splits = read_description(Path(folder))["splits"]
    first = [split for split in EVALUATION_SPLITS if split in splits]
    return first + [split for split in splits if is_evaluation(split) and split not in first]


def images_of_split(folder: Path, split: str) -> ImageTable:
    """Images of another data set. Their keys get its name as a prefix."""
    dataset, decoder = open_dataset(folder, split), decoder_with_max_limit()
    name = Path(folder).name
    return tabulate((f"{name}/{dataset.keys[i]}", split, image_facts(dataset, i, decoder)) for i in range(len(dataset)))


def find_leaks(
    images: ImageTable, evaluation: Sequence[ImageTable], dropped: dict[int, str], *, own_splits: bool = True
) -> Iterator[dict[str, Any]]:
    """Drop training images that an evaluation split contains, and yield a line of duplicates.jsonl for each.

    A generator: images are dropped only while it is consumed.

    Args:
        evaluation: evaluation images of other data sets, in addition to those in `images`.
        dropped: position -> reason, for the images that are already dropped. Leaks are added.
        own_splits: whether the evaluation splits in `images` count too.
    """
    own = [i for i, s in enumerate(images.splits) if own_splits and is_evaluation(s) and i not in dropped]
    tables = [_take(images, own), *evaluation]
    names = [f"{split}/{key}" for table in tables for split, key in zip(table.splits, table.keys, strict=True)]
    digests = np.concatenate([table.digest for table in tables]).tolist()
    known = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    usable = np.flatnonzero(np.concatenate([table.has_hash for table in tables]))
    hashes = np.concatenate([table.phash for table in tables])[usable]
    aspects = np.concatenate([table.aspect for table in tables])[usable]
    train = [i for i, split in enumerate(images.splits) if split == "train" and i not in dropped]
    near = near_known(images.phash[train], images.aspect[train], hashes, aspects, _MAX_ASPECT_CHANGE)
    for i, j in zip(train, near.tolist(), strict=True):
        exact = known.get(images.digest[i].item())
        if exact is not None:
            dropped[i] = LEAKED
            yield _duplicate_line(images, i, "exact", names[exact])
        elif j >= 0 and images.has_hash[i]:
            dropped[i] = LEAKED_NEARLY
            yield _duplicate_line(images, i, "near", names[usable[j]])


def find_duplicates(
    images: ImageTable, dropped: dict[int, str], *, drop: bool, drop_near: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a line of duplicates.jsonl for each image that repeats an earlier one of its split.

    A generator: images are dropped only while it is consumed.

    Args:
        dropped: position -> reason, for the images that are already dropped.
        drop, drop_near: add exact duplicates, or near-duplicates, to `dropped`.
    """
    for split in sorted(set(images.splits)):
        own = np.array([i for i, s in enumerate(images.splits) if s == split and i not in dropped], np.int64)
        first = first_equal(images.digest[own])
        repeated = first != np.arange(len(own))
        for place in np.flatnonzero(repeated):
            i = int(own[place])
            yield _duplicate_line(images, i, "exact", f"{split}/{images.keys[own[first[place]]]}")
            if drop:
                dropped[i] = REPEATED
        rest = own[~repeated & images.has_hash[own]]
        nearest: dict[int, int] = {}
        for a, b in near_pairs(images.phash[rest], images.aspect[rest], _MAX_ASPECT_CHANGE):
            i, j = int(rest[a]), int(rest[b])
            nearest[j] = min(i, nearest.get(j, i))
        for j, i in sorted(nearest.items()):
            yield _duplicate_line(images, j, "near", f"{split}/{images.keys[i]}")
            if drop_near:
                dropped[j] = REPEATED_NEARLY


def _take(images: ImageTable, rows: list[int]) -> ImageTable:
    return ImageTable(
        [images.keys[i] for i in rows],
        [images.splits[i] for i in rows],
        images.digest[rows],
        images.phash[rows],
        images.has_hash[rows],
        images.aspect[rows],
    )


def _duplicate_line(images: ImageTable, i: int, kind: str, of: str) -> dict[str, Any]:
    return {"key": images.keys[i], "split": images.splits[i], "kind": kind, "of": of}


UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

MAX_DISTANCE = 3
"""Maximum number of differing bits, of 64, between the hashes of near-duplicates."""
_BANDS = MAX_DISTANCE + 1
_ROWS = 2048


def first_equal(digests: NDArray[np.bytes_]) -> Int64:
    """Position of the first image with an equal digest, for each image: int64 (n,)."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)].astype(np.int64)


def near_pairs(hashes: UInt64, aspects: Float64, max_aspect_ratio: float) -> Iterator[tuple[int, int]]:
    """Pairs i < j of near hashes (n,), which differ in at most MAX_DISTANCE bits. Each once, in no fixed order.

    Among equal hashes only the pairs with the first image of a similar aspect ratio are yielded: a thousand copies give
    a thousand pairs, not half a million.

    Args:
        aspects: aspect ratios of the images (n,).
        max_aspect_ratio: maximum quotient of two similar ones, at least 1. Pairs of others are left out.

    Two near hashes agree in at least one of MAX_DISTANCE + 1 bands of 16 bits. Only hashes that share a band are
    compared, and a pair is yielded for the first band that it shares.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse.reshape(-1)))[:-1])
    shapes: list[float] = aspects.tolist()
    for same in members:
        yield from _within(same, shapes, max_aspect_ratio)
    for one, other in _near_values(values):
        for i in members[one]:
            for j in members[other]:
                if _similar(shapes[i], shapes[j], max_aspect_ratio):
                    yield (int(i), int(j)) if i < j else (int(j), int(i))


def _similar(one: float, other: float, max_aspect_ratio: float) -> bool:
    return max(one, other) <= max_aspect_ratio * min(one, other)


def _within(same: Int64, shapes: list[float], max_aspect_ratio: float) -> Iterator[tuple[int, int]]:
    """Each image of equal hashes with the first one of a similar shape. First ones of few shapes are kept."""
    firsts: list[int] = []
    for j in same.tolist():
        known = next((i for i in firsts if _similar(shapes[i], shapes[j], max_aspect_ratio)), None)
        if known is None:
            firsts.append(j)
        else:
            yield known, j


def _near_values(values: UInt64) -> Iterator[tuple[int, int]]:
    """Positions a < b of near hashes among distinct ones."""
    bands = [(values >> np.uint64(16 * band)) & np.uint64(0xFFFF) for band in range(_BANDS)]
    for band in range(_BANDS):
        order = np.argsort(bands[band], kind="stable")
        starts = np.flatnonzero(np.diff(bands[band][order], prepend=np.uint64(1 << 20)))
        for group in np.split(order, starts[1:]):
            for begin in range(0, len(group) if len(group) > 1 else 0, _ROWS):
                rows = group[begin : begin + _ROWS]
                near = np.bitwise_count(values[rows][:, None] ^ values[group][None, :]) <= MAX_DISTANCE
                one, other = rows[np.nonzero(near)[0]], group[np.nonzero(near)[1]]
                new = one < other
                for earlier in bands[:band]:
                    new &= earlier[one] != earlier[other]
                yield from zip(one[new].tolist(), other[new].tolist(), strict=True)


def near_known(
    hashes: UInt64, aspects: Float64, known: UInt64, known_aspects: Float64, max_aspect_ratio: float
) -> Int64:
    """Position of the first near hash in `known` with a similar aspect ratio, for each hash; -1 if absent: int64 (n,).

    Args:
        max_aspect_ratio: maximum quotient of two similar aspect ratios, at least 1.
    """
    found = np.full(len(hashes), len(known), np.int64)
    for band in range(_BANDS):
        shift = np.uint64(16 * band)
        keys = (known >> shift) & np.uint64(0xFFFF)
        order = np.argsort(keys, kind="stable")
        wanted = (hashes >> shift) & np.uint64(0xFFFF)
        begin = np.searchsorted(keys[order], wanted, side="left")
        end = np.searchsorted(keys[order], wanted, side="right")
        for i in np.flatnonzero(end > begin):
            candidates = order[begin[i] : end[i]]
            ratio = known_aspects[candidates] / aspects[i]
            near = np.bitwise_count(known[candidates] ^ hashes[i]) <= MAX_DISTANCE
            near &= np.maximum(ratio, 1 / ratio) <= max_aspect_ratio
            if near.any():
                found[i] = min(found[i], candidates[near].min())
    return np.where(found < len(known), found, -1)
