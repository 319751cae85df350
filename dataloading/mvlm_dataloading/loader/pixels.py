"""Pixels on the CPU: crop windows and checks of file ends, resizing, and recycled buffers of batches.

The DALI graph calls these functions once per batch. The same arithmetic of crops in DALI operators took a tenth of the
graph's time on a CPU, and DALI's antialiased resize three times as long as torch's, which is vectorized for uint8. On a
GPU the graph uses DALI's resize.

Shape legend: B batch, S image side, H and W of an image as stored, or of a crop.
"""

import ctypes
import functools
import hashlib
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FILE_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"\x60\x82", b"RI": None}
"""First two bytes of a JPEG, PNG or WebP file -> its last two, None where they vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropGeometry:
    """Rule by which an image is cut and resized to a square: a random crop, or the uncropped image (`random=False`).

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


class FileEnds:
    """Check that an image file begins and ends as a whole JPEG, PNG or WebP does. Other files may be truncated.

    A crop above the cut of a truncated file would still decode. Some good files have bytes after their end. Each of
    these is allowed by itself, once its whole image has been decoded, so that the verdict on a file depends on no
    other.
    """

    def __init__(self) -> None:
        self.allowed: set[bytes] = set()
        """Hashes of files that pass although they do not end as usual."""

    def allow(self, file: bytes) -> None:
        """Let this file, whose whole image has been decoded, pass from now on."""
        self.allowed.add(_digest(file))

    def __call__(self, files: Sequence[Any]) -> list[NDArray[np.bool_]]:
        """Verdict on each file, a bool scalar, True = it passes, in the form that DALI's python function returns."""
        return [np.array(self._passes(np.asarray(file))) for file in files]

    def _passes(self, file: NDArray[np.uint8]) -> bool:
        first = file[:2].tobytes()
        if first in FILE_ENDS and FILE_ENDS[first] in (None, file[-2:].tobytes()):
            return True
        return bool(self.allowed) and _digest(file.tobytes()) in self.allowed


def _digest(file: bytes) -> bytes:
    return hashlib.blake2b(file, digest_size=16).digest()


UInt8 = NDArray[np.uint8]
_NOTHING = np.zeros((0, 0, 0), np.uint8)


@functools.cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    """The thread pool that all graphs share. A new graph is built every few thousand samples."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mvlm-resize")


# NOTE: a forked process has none of its parent's threads. Tasks given to the parent's pool would never run.
os.register_at_fork(after_in_child=_thread_pool.cache_clear)


class Resize:
    """Bilinear, antialiased resize of a batch of uint8 (H, W, 3) to squares.

    Args:
        side: S, of the squares in pixels.
        planes: return uint8 (3, S, S); else (S, S, 3).
        into: function of the number of crops that returns an array (B, 3, S, S), or (B, S, S, 3), to write the images
            to. Empty arrays are then returned: DALI would copy others once more.
    """

    def __init__(
        self, side: int, threads: int, *, planes: bool, into: Callable[[int], NDArray[np.uint8]] | None = None
    ):
        self._side, self._threads, self._planes, self._into = side, threads, planes, into
        self.layout = "CHW" if planes else "HWC"

    def __call__(self, batch: Any) -> list[UInt8]:
        crops = [np.asarray(crop) for crop in batch]
        resized: Any = [None] * len(crops) if self._into is None else self._into(len(crops))
        waiting = iter(range(len(crops)))

        def resize_waiting(_: int = 0) -> None:
            for i in waiting:  # each thread takes the next crop, because crops differ in size
                resized[i] = self._resize(crops[i])

        try:
            if self._threads > 1:
                # Threads run in parallel here because torch releases the GIL while it resizes.
                list(_thread_pool(self._threads).map(resize_waiting, range(self._threads)))
            else:
                resize_waiting()
        except RuntimeError:
            # The interpreter is exiting, and the pool takes no more work. An error would count as a damaged image. All
            # crops are resized here, because a thread that began may still be at work on one.
            for i, crop in enumerate(crops):
                resized[i] = self._resize(crop)
        return resized if self._into is None else [_NOTHING] * len(crops)

    def _resize(self, crop: UInt8) -> UInt8:
        size = (self._side, self._side)
        # No torch copy on these threads: each would open an OpenMP team (see `copy_on_this_thread`). torch
        # copies when the size does not change, and when the result needs another memory layout.
        if crop.shape[:2] == size:
            return np.ascontiguousarray(crop.transpose(2, 0, 1) if self._planes else crop)
        pixels = torch.from_numpy(crop)
        # Both are (1, 3, H, W) with channels last in memory. torch returns planes for the first, channels last for the
        # second.
        pixels = pixels.permute(2, 0, 1)[None] if self._planes else pixels[None].permute(0, 3, 1, 2)
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        return np.ascontiguousarray((pixels if self._planes else pixels.permute(1, 2, 0)).numpy())


class BufferPool:
    """Allocates uint8 tensors in recycled memory, which is free again when the last view of a tensor is gone.

    A batch of images takes megabytes and stays alive until its consumer drops it. malloc would fragment the heap, and
    fresh mmap pages cost several times the copy. Eight idle buffers are kept.
    """

    def __init__(self) -> None:
        self._spare: deque[mmap.mmap] = deque(maxlen=8)

    def __len__(self) -> int:
        """Number of buffers that no tensor uses."""
        return len(self._spare)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """An uninitialized uint8 CPU tensor of a shape with at least one element."""
        size = math.prod(shape)
        buffer = self._spare.pop() if self._spare else None
        if buffer is None or len(buffer) < size:
            # MAP_PRIVATE: a forked process keeps the content that it had at the fork.
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Only the tensor holds the handle, so the handle dies with the tensor and its last view.
        handle = (ctypes.c_uint8 * size).from_buffer(buffer)
        weakref.finalize(handle, self._spare.append, buffer).atexit = False
        return torch.frombuffer(handle, dtype=torch.uint8).view(*shape)

    def copy(self, source: Tensor) -> Tensor:
        """A copy of a nonempty uint8 CPU tensor of any shape."""
        copy = self.empty(source.shape)
        copy_on_this_thread(copy, source)
        return copy


def copy_on_this_thread(target: Tensor, source: Tensor) -> None:
    """Copy a CPU tensor into another of the same shape, with numpy.

    torch's `copy_` opens an OpenMP team for each thread that calls it. With a second team in the process, libgomp
    counts more threads than cores, so the training step's threads sleep between operations instead of spinning. On two
    cores, this made training of `tiny` a quarter slower.
    """
    np.copyto(target.numpy(), source.numpy())
