"""Duplicate images between training and evaluation splits, or within a split, and the search for near hashes.

Two images are exact duplicates if their published files are equal. They are near-duplicates if their perceptual hashes
differ in at most 3 of 64 bits and their aspect ratios by at most 10 %.

Shape legend: n images, m known images.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import read_description
from mvlm_dataloading.dataset.open import open_dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.sources.record import EVALUATION_SPLITS, is_evaluation

from .image_check import StoredHeader, on_white, perceptual_hash, read_header

LEAKED = "image is in an evaluation split"
LEAKED_NEARLY = "image is a near-duplicate of one in an evaluation split"
REPEATED = "image is a duplicate"
REPEATED_NEARLY = "image is a near-duplicate"
MAX_DISTANCE = 3
"""Maximum number of differing bits, of 64, between the hashes of near-duplicates."""
MAX_ASPECT_CHANGE = 1.1
"""Maximum quotient of the aspect ratios of near-duplicates."""
_BANDS = MAX_DISTANCE + 1
_ROWS = 2048

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts by which images are compared: key and split of the sample, size in pixels, and two hashes."""

    key: str
    split: str
    width: int
    height: int
    sha256: bytes
    """SHA-256 of the image file as published, before a build changed it."""
    phash: int | None
    """Perceptual hash; None for a flat image."""


def parse_image_facts(key: str, split: str, metadata: Mapping[str, Any]) -> ImageFacts:
    """Read the facts of an image from the metadata that a build stores in `<key>.json`.

    Raises KeyError, TypeError or ValueError if they are missing or malformed.
    """
    width, height = int(metadata["width"]), int(metadata["height"])
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height}")
    phash = None if metadata["phash"] is None else int(metadata["phash"], 16)
    return ImageFacts(key, split, width, height, bytes.fromhex(metadata["sha256"]), phash)


def image_facts(dataset: Dataset, i: int, decoder: ImageDecoder) -> ImageFacts:
    """Facts of a sample, from its metadata. They are computed for shards of other tools, which lack them.

    The hash of a transparent image is that of the image on white, as in a build. DataError if it cannot be decoded.
    """
    key, split, metadata = dataset.keys[i], dataset.split, dataset.metadata(i)
    try:
        return parse_image_facts(key, split, metadata)
    except (KeyError, TypeError, ValueError):
        image = dataset.image_bytes(i)
    (pixels,) = decoder([image])
    if isinstance(pixels, str):
        raise DataError(f"{dataset.where(i)}: wanted an image, found that {pixels}; leave the sample out")
    header = read_header(image)
    white = on_white(image) if isinstance(header, StoredHeader) and header.has_alpha else None
    pixels = white if isinstance(white, np.ndarray) else pixels
    height, width = pixels.shape[:2]
    return ImageFacts(key, split, width, height, hashlib.sha256(image).digest(), perceptual_hash(pixels))


def evaluation_images(folder: Path) -> Iterator[ImageFacts]:
    """Images of all evaluation splits of another data set, validation and test first. Keys begin with its name."""
    splits = [split for split in read_description(folder)["splits"] if is_evaluation(split)]
    decoder = ImageDecoder()
    for split in sorted(splits, key=lambda one: (*EVALUATION_SPLITS, one).index(one)):
        dataset = open_dataset(folder, split)
        for i in range(len(dataset)):
            facts = image_facts(dataset, i, decoder)
            yield replace(facts, key=f"{folder.name}/{facts.key}")


def drop_leaks(
    images: Sequence[ImageFacts], evaluation: Sequence[ImageFacts], dropped: dict[int, str], *, own_splits: bool = True
) -> list[dict[str, Any]]:
    """Drop training images that an evaluation split contains. Returns a line of duplicates.jsonl for each.

    Args:
        evaluation: evaluation images of other data sets, in addition to those in `images`.
        dropped: position -> reason, for the images that are already dropped. Leaks are added.
        own_splits: whether the evaluation splits in `images` count too.
    """
    left = [(i, image) for i, image in enumerate(images) if i not in dropped]
    known = [image for _, image in left if own_splits and is_evaluation(image.split)] + [*evaluation]
    exact = {image.sha256: image for image in reversed(known)}
    hashed = [image for image in known if image.phash is not None]
    train = [(i, image) for i, image in left if image.split == "train"]
    near = near_known(*_hashes(image for _, image in train), *_hashes(hashed))
    lines = []
    for (i, image), j in zip(train, near.tolist(), strict=True):
        if image.sha256 in exact:
            dropped[i] = LEAKED
            lines.append(_line(image, "exact", exact[image.sha256]))
        elif j >= 0 and image.phash is not None:
            dropped[i] = LEAKED_NEARLY
            lines.append(_line(image, "near", hashed[j]))
    return lines


def drop_repeats(
    images: Sequence[ImageFacts], dropped: dict[int, str], *, drop: bool, drop_near: bool = False
) -> list[dict[str, Any]]:
    """Find the images that repeat an earlier one of their split. Returns a line of duplicates.jsonl for each.

    Args:
        drop, drop_near: add exact duplicates, or near-duplicates, to `dropped`.
    """
    lines = []
    for split in sorted({image.split for image in images}):
        first: dict[bytes, int] = {}
        rest: list[int] = []
        for i in [i for i, image in enumerate(images) if image.split == split and i not in dropped]:
            j = first.setdefault(images[i].sha256, i)
            if j != i:
                lines.append(_line(images[i], "exact", images[j]))
                if drop:
                    dropped[i] = REPEATED
            elif images[i].phash is not None:
                rest.append(i)
        nearest: dict[int, int] = {}
        for a, b in near_pairs(*_hashes(images[i] for i in rest)):
            nearest[rest[b]] = min(rest[a], nearest.get(rest[b], rest[a]))
        for j, i in sorted(nearest.items()):
            lines.append(_line(images[j], "near", images[i]))
            if drop_near:
                dropped[j] = REPEATED_NEARLY
    return lines


def _hashes(images: Iterator[ImageFacts] | Sequence[ImageFacts]) -> tuple[UInt64, Float64]:
    """Perceptual hashes, 0 for None, and aspect ratios: uint64 (n,), float64 (n,)."""
    rows = [(image.phash or 0, image.width / image.height) for image in images]
    return np.array([phash for phash, _ in rows], np.uint64), np.array([aspect for _, aspect in rows], np.float64)


def _line(image: ImageFacts, kind: str, of: ImageFacts) -> dict[str, Any]:
    return {"key": image.key, "split": image.split, "kind": kind, "of": f"{of.split}/{of.key}"}


def near_pairs(hashes: UInt64, aspects: Float64) -> Iterator[tuple[int, int]]:
    """Pairs i < j of near hashes (n,) of images with similar aspect ratios (n,). Each once, in no fixed order.

    Among equal hashes only the pairs with the first image of a similar aspect ratio are yielded: a thousand copies give
    a thousand pairs, not half a million.

    Two near hashes agree in at least one of MAX_DISTANCE + 1 bands of 16 bits. Only hashes that share a band are
    compared, and a pair is yielded for the first band that it shares.
    """
    values, inverse = np.unique(hashes, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse.reshape(-1)))[:-1])
    shapes: list[float] = aspects.tolist()
    for same in members:
        yield from _within(same, shapes)
    for one, other in _near_values(values):
        for i in members[one]:
            for j in members[other]:
                if _similar(shapes[i], shapes[j]):
                    yield (int(i), int(j)) if i < j else (int(j), int(i))


def _similar(one: float, other: float) -> bool:
    return max(one, other) <= MAX_ASPECT_CHANGE * min(one, other)


def _within(same: Int64, shapes: list[float]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of images of equal hash: j, and the first image i before it of a similar aspect ratio, if any.

    same: positions of the images. shapes: aspect ratio of each position.
    """
    firsts: list[int] = []
    for j in same.tolist():
        known = next((i for i in firsts if _similar(shapes[i], shapes[j])), None)
        if known is None:
            firsts.append(j)
        else:
            yield known, j


def _near_values(values: UInt64) -> Iterator[tuple[int, int]]:
    """Positions a < b of each pair of distinct perceptual hashes that differ in at most MAX_DISTANCE bits."""
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


def near_known(hashes: UInt64, aspects: Float64, known: UInt64, known_aspects: Float64) -> Int64:
    """For each of n images, the first of m known images that is a near-duplicate: its position, int64 (n,), or -1.

    Args:
        hashes, aspects: perceptual hashes and aspect ratios of the images, (n,).
        known, known_aspects: those of the known images, (m,).
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
            near &= np.maximum(ratio, 1 / ratio) <= MAX_ASPECT_CHANGE
            if near.any():
                found[i] = min(found[i], candidates[near].min())
    return np.where(found < len(known), found, -1)
