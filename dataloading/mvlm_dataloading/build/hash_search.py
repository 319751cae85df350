"""Search for equal digests and for near perceptual hashes.

Shape legend: n images.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

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
