"""Random crops, and a check of file ends: numpy functions that the DALI graph calls once per batch.

The same arithmetic in DALI operators took a tenth of the graph's time on a CPU.

Shape legend: B batch, H and W of the image as stored.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"\x60\x82", b"RI": None}
"""First two bytes of a JPEG, PNG or WebP file -> its last two, None where they vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropGeometry:
    """Crop and size of an image: a random crop, or the uncropped image (`random=False`), resized to a square.

    Field names are hashed into the loader's state. A renamed field would make old states look different.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over its height."""
    random: bool = True
    strip: int = 1
    """Number n of square images in a stored one (S, n S), side by side. Each is cropped alike, and resized."""

    def __post_init__(self) -> None:
        for name, (low, high), limit in (("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, np.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"wanted {name} as 0 < low <= high <= {limit}, got ({low}, {high})")


class CropWindows:
    """Compute crop windows for a batch of image shapes (H, W, 3): corners (y, x) and sizes (h, w), int32 (2,) each.

    From four uniform numbers u0 to u3 per image:

        area = H W (a0 + (a1 - a0) u0)                   ratio = r0 (r1 / r0)^u1
        h = round(sqrt(area / ratio))                    w = round(sqrt(area ratio)), both clamped to the image
        y = floor(u2 (H - h + 1))                        x = floor(u3 (W - w + 1))

    a0 and a1 are `crop_scale`, r0 and r1 `crop_ratio`. Of a strip of n images, H and W are those of one image. Three
    more arrays of int32 (2,) follow then: the sizes (h, w) of the crop of one image, the steps (0, W) from one to the
    next, and the sizes of the whole strips; and the first sizes are those of the box around all n crops.

    Args:
        uniforms_of_batch: batch number k, 0 for the first call -> uniform numbers, float64 (B, 4).
    """

    def __init__(self, geometry: CropGeometry, uniforms_of_batch: Callable[[int], NDArray[np.float64]]):
        self._geometry, self._uniforms_of_batch = geometry, uniforms_of_batch
        self._batches = 0

    def __call__(self, shapes: Any) -> tuple[list[NDArray[np.int32]], ...]:
        whole = image_sizes = np.array([np.asarray(shape) for shape in shapes], np.float64)[:, :2]  # (B, 2): H, W
        images = self._geometry.strip
        if images > 1:
            image_sizes = np.stack([whole[:, 0], np.maximum(1, whole[:, 1] // images)], axis=1)
        corners, sizes = np.zeros_like(image_sizes), image_sizes
        if self._geometry.random:
            corners, sizes = self._random_windows(image_sizes, self._uniforms_of_batch(self._batches))
        self._batches += 1
        found = [corners, sizes]
        if images > 1:
            steps = np.stack([np.zeros(len(whole)), whole[:, 1] // images], axis=1)
            found = [corners, sizes + (images - 1) * steps, sizes, steps, whole]
        return tuple(list(values.astype(np.int32)) for values in found)

    def _random_windows(
        self, image_sizes: NDArray[np.float64], u: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        (low, high), (narrow, wide) = self._geometry.crop_scale, self._geometry.crop_ratio
        area = image_sizes.prod(axis=1) * (low + (high - low) * u[:, 0])
        ratio = narrow * (wide / narrow) ** u[:, 1]
        sides = np.sqrt(np.stack([area / ratio, area * ratio], axis=1))  # (B, 2): h, w
        sizes = np.clip(np.floor(sides + 0.5), 1.0, image_sizes)
        # The minimum guards against a product that is rounded up to H - h + 1.
        return np.minimum(np.floor(u[:, 2:] * (image_sizes - sizes + 1.0)), image_sizes - sizes), sizes


def strip_fault(height: int, width: int, images: int) -> str | None:
    """Fault of an image of this size that should be a strip of square images; None without one."""
    if width == images * height:
        return None
    return (
        f"wanted a strip of {images} square images side by side, {images} times as wide as high, found {width} x "
        f"{height} pixels; build the data again"
    )


class FileEnds:
    """Tells image files with right first and last bytes from others, which may be truncated.

    Of a truncated file a crop above the cut decodes. Some good files have bytes after their end. Each of these is
    allowed by itself, once its whole image has been decoded, so that the verdict on a file depends on no other.
    """

    def __init__(self) -> None:
        self.allowed: set[bytes] = set()
        """Hashes of the good files with other ends."""

    def allow(self, file: bytes) -> None:
        """Let a file pass from now on."""
        self.allowed.add(_digest(file))

    def __call__(self, files: Sequence[Any]) -> list[NDArray[np.bool_]]:
        """Verdicts on files, bool scalars, as DALI's python function returns them."""
        return [np.array(self._passes(np.asarray(file))) for file in files]

    def _passes(self, file: NDArray[np.uint8]) -> bool:
        return _file_has_valid_ends(file) or bool(self.allowed and _digest(file.tobytes()) in self.allowed)


def _digest(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()


def _file_has_valid_ends(file: NDArray[np.uint8]) -> bool:
    first = file[:2].tobytes()
    return first in FILE_ENDS and FILE_ENDS[first] in (None, file[-2:].tobytes())
