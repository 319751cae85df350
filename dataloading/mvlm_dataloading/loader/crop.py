"""The window to cut from each picture, and whether a file looks whole: small arithmetic inside the DALI graph.

A few numbers a picture in numpy, called by DALI with a batch. As DALI's own operators, each over the whole batch, this
took a tenth of a graph's time on a CPU.

Shape legend: B batch, H and W of the picture as stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"\x60\x82", b"RI": None}
"""First two bytes of a JPEG, a PNG, a WebP, and the last two, if they are always the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What becomes of a picture: a random window, or the whole (`random=False`), resized to a square."""

    image_size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """The window's share of the picture's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The window's width over its height."""
    random: bool = True

    def __post_init__(self) -> None:
        for name, (low, high), limit in (("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, np.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"wanted {name} as 0 < low <= high <= {limit}, got ({low}, {high})")


class Windows:
    """Corners (y, x) and sizes (h, w), int32 (2,) each, for a batch of shapes (H, W, 3); batch after batch.

    From four uniform numbers u: area = H W (a0 + (a1 - a0) u0), ratio = r0 (r1 / r0)^u1; w = round(sqrt(area ratio))
    and h = round(sqrt(area / ratio)), each clamped to the picture; y = floor(u2 (H - h + 1)), x = floor(u3 (W - w +
    1)).

    Args:
        draws: gives for the k-th batch the uniform numbers, float64 (B, 4).
    """

    def __init__(self, geometry: Geometry, draws: Callable[[int], NDArray[np.float64]]):
        self._geometry, self._draws = geometry, draws
        self._batches = 0

    def __call__(self, shapes: Any) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
        whole = np.array([np.asarray(shape) for shape in shapes], np.float64)[:, :2]  # (B, 2)
        corners, sizes = np.zeros_like(whole), whole
        if self._geometry.random:
            corners, sizes = self._cut(whole, self._draws(self._batches))
        self._batches += 1
        return list(corners.astype(np.int32)), list(sizes.astype(np.int32))

    def _cut(self, whole: NDArray[np.float64], u: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
        (low, high), (narrow, wide) = self._geometry.crop_scale, self._geometry.crop_ratio
        area = whole.prod(axis=1) * (low + (high - low) * u[:, 0])
        ratio = narrow * (wide / narrow) ** u[:, 1]
        sides = np.sqrt(np.stack([area / ratio, area * ratio], axis=1))  # (B, 2): h, w
        sizes = np.clip(np.floor(sides + 0.5), 1.0, whole)
        return np.minimum(np.floor(u[:, 2:] * (whole - sizes + 1.0)), whole - sizes), sizes


def looks_whole(files: Sequence[Any]) -> list[NDArray[np.bool_]]:
    """Scalars: whether a file, uint8 (bytes,), begins and ends as a JPEG or a PNG does, or begins as a WebP."""
    return [np.array(_ends_well(np.asarray(file))) for file in files]


def _ends_well(file: NDArray[np.uint8]) -> bool:
    first = file[:2].tobytes()
    return first in ENDS and ENDS[first] in (None, file[-2:].tobytes())
