"""Which pictures of a data set are the same: in training and in an evaluation, or twice in a split.

Two pictures are the same exactly if their files as published are equal, and nearly if their perceptual hashes differ in
at most 3 of 64 bits and their shapes by at most a tenth.

Shape legend: n pictures.
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
from mvlm_dataloading.sources.record import EVALUATION_SPLITS

from .hash_search import first_equal, near_known, near_pairs
from .image_check import Decoder, perceptual_hash

LEAKED = "picture is in an evaluation split"
LEAKED_NEARLY = "picture is nearly one of an evaluation split"
REPEATED = "picture was there before"
REPEATED_NEARLY = "picture is nearly one that was there before"
_ASPECT = 1.1


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one picture."""

    width: int
    height: int
    sha256: bytes
    """Of the file as published."""
    phash: int | None


@dataclass(frozen=True, slots=True)
class Pictures:
    """What is known of many: lists and arrays (n,)."""

    keys: list[str]
    splits: list[str]
    digest: NDArray[np.bytes_]
    phash: NDArray[np.uint64]
    has_hash: NDArray[np.bool_]
    """True where there is a perceptual hash."""
    aspect: NDArray[np.float64]
    """Width over height."""


def parse_facts(metadata: Mapping[str, Any]) -> Facts:
    """The facts that our writer stores in `<key>.json`. KeyError, TypeError or ValueError where they are not there."""
    known = metadata["phash"]
    width, height = int(metadata["width"]), int(metadata["height"])
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height}")
    return Facts(width, height, bytes.fromhex(metadata["sha256"]), None if known is None else int(known, 16))


def facts_of(dataset: Dataset, i: int, decoder: Decoder) -> Facts:
    """The facts of a sample, from its metadata, or found out where other tools wrote it.

    Raises:
        DataError: the picture cannot be decoded.
    """
    try:
        return parse_facts(dataset.metadata(i))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
    image = dataset.image_bytes(i)
    (pixels,) = decoder([image])
    if isinstance(pixels, str):
        raise DataError(f"{dataset.where(i)}: wanted an image, found that {pixels}; leave the sample out")
    height, width = pixels.shape[:2]
    return Facts(width, height, hashlib.sha256(image).digest(), perceptual_hash(pixels))


def any_size() -> Decoder:
    """A decoder for pictures that a writer has let pass: its bound is the highest there is."""
    return Decoder(MAX_PIXELS)


def collect(facts: Iterable[tuple[str, str, Facts]]) -> Pictures:
    """Key, split and facts of many pictures, side by side."""
    rows = list(facts)
    return Pictures(
        keys=[key for key, _, _ in rows],
        splits=[split for _, split, _ in rows],
        digest=np.array([one.sha256 for _, _, one in rows], "S32"),
        phash=np.array([one.phash or 0 for _, _, one in rows], np.uint64),
        has_hash=np.array([one.phash is not None for _, _, one in rows], np.bool_),
        aspect=np.array([one.width / one.height for _, _, one in rows], np.float64),
    )


def evaluation_splits(folder: Path) -> list[str]:
    """Those of a data set's splits that nothing may be trained on."""
    return [split for split in EVALUATION_SPLITS if split in read_description(Path(folder))["splits"]]


def pictures_of(folder: Path, split: str) -> Pictures:
    """The pictures of another data set, whose keys say where they are from."""
    dataset, decoder = open_dataset(folder, split), any_size()
    name = Path(folder).name
    return collect((f"{name}/{dataset.keys[i]}", split, facts_of(dataset, i, decoder)) for i in range(len(dataset)))


def find_leaks(pictures: Pictures, evaluation: Sequence[Pictures], dropped: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Drop training pictures that are in an evaluation split, of their own set or of `evaluation`, and tell of each.

    `dropped` maps the positions of what is left out to the reason; it is added to.
    """
    own = [i for i, split in enumerate(pictures.splits) if split in EVALUATION_SPLITS and i not in dropped]
    held = [_take(pictures, own), *evaluation]
    names = [f"{split}/{key}" for one in held for split, key in zip(one.splits, one.keys, strict=True)]
    digests = np.concatenate([one.digest for one in held]).tolist()
    known = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    usable = np.flatnonzero(np.concatenate([one.has_hash for one in held]))
    hashes = np.concatenate([one.phash for one in held])[usable]
    aspects = np.concatenate([one.aspect for one in held])[usable]
    train = [i for i, split in enumerate(pictures.splits) if split == "train" and i not in dropped]
    near = near_known(pictures.phash[train], pictures.aspect[train], hashes, aspects, _ASPECT)
    for i, j in zip(train, near.tolist(), strict=True):
        exact = known.get(pictures.digest[i].item())
        if exact is not None:
            dropped[i] = LEAKED
            yield _duplicate(pictures, i, "exact", names[exact])
        elif j >= 0 and pictures.has_hash[i]:
            dropped[i] = LEAKED_NEARLY
            yield _duplicate(pictures, i, "near", names[usable[j]])


def find_duplicates(
    pictures: Pictures, dropped: dict[int, str], *, drop: bool, drop_near: bool = False
) -> Iterator[dict[str, Any]]:
    """Tell of pictures that were in their split before, and drop the exact ones, or the near ones too, if so asked."""
    for split in sorted(set(pictures.splits)):
        own = np.array([i for i, s in enumerate(pictures.splits) if s == split and i not in dropped], np.int64)
        first = first_equal(pictures.digest[own])
        again = first != np.arange(len(own))
        for place in np.flatnonzero(again):
            i = int(own[place])
            yield _duplicate(pictures, i, "exact", f"{split}/{pictures.keys[own[first[place]]]}")
            if drop:
                dropped[i] = REPEATED
        rest = own[~again & pictures.has_hash[own]]
        nearest: dict[int, int] = {}
        for a, b in near_pairs(pictures.phash[rest]):
            i, j = int(rest[a]), int(rest[b])
            one, other = sorted((pictures.aspect[i], pictures.aspect[j]))
            if other <= _ASPECT * one:
                nearest[j] = min(i, nearest.get(j, i))
        for j, i in sorted(nearest.items()):
            yield _duplicate(pictures, j, "near", f"{split}/{pictures.keys[i]}")
            if drop_near:
                dropped[j] = REPEATED_NEARLY


def _take(pictures: Pictures, rows: list[int]) -> Pictures:
    return Pictures(
        [pictures.keys[i] for i in rows],
        [pictures.splits[i] for i in rows],
        pictures.digest[rows],
        pictures.phash[rows],
        pictures.has_hash[rows],
        pictures.aspect[rows],
    )


def _duplicate(pictures: Pictures, i: int, kind: str, of: str) -> dict[str, Any]:
    return {"key": pictures.keys[i], "split": pictures.splits[i], "kind": kind, "of": of}
