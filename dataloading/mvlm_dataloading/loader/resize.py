"""Resizing on the CPU with torch, called from the DALI graph.

On a CPU, DALI's antialiased resize takes three times as long as torch's, which is vectorized for uint8. torch's results
agree with Pillow's to one level. On a GPU the graph uses DALI's resize.

Shape legend: S image side, H and W of a crop.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
_NOTHING = np.zeros((0, 0, 0), np.uint8)


@functools.cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    """The thread pool that all graphs share. A new graph is built every few thousand samples."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mvlm-resize")


# A forked process has none of its parent's threads, so tasks given to the parent's pool would never run.
os.register_at_fork(after_in_child=_thread_pool.cache_clear)


class Resize:
    """Bilinear, antialiased resize of a batch of uint8 (H, W, 3) to squares.

    Args:
        planes: return uint8 (3, S, S); else (S, S, 3).
        into: number of crops -> array (B, 3, S, S), or (B, S, S, 3), that the images are written to. Arrays of no
            element are returned then: DALI would copy them once more.
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
        # No torch copy on these threads: each would open an OpenMP team (see `buffers.copy_on_this_thread`). torch
        # copies when the size does not change, and when the result needs another memory layout.
        if crop.shape[:2] == size:
            return np.ascontiguousarray(crop.transpose(2, 0, 1) if self._planes else crop)
        pixels = torch.from_numpy(crop)
        # Both are (1, 3, H, W) with channels last in memory. torch returns planes for the first, channels last for the
        # second.
        pixels = pixels.permute(2, 0, 1)[None] if self._planes else pixels[None].permute(0, 3, 1, 2)
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        return np.ascontiguousarray((pixels if self._planes else pixels.permute(1, 2, 0)).numpy())
