"""Resizing on the CPU, as a part of the DALI graph.

DALI's antialiased resizing takes three times as long on a CPU as torch's, which works on bytes in vector registers and
agrees with Pillow's to a level. On a GPU it is DALI's.

Shape legend: S image side, H and W of a window.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """One pool for all graphs: a new graph begins every some thousand samples."""
    return ThreadPoolExecutor(count, thread_name_prefix="mvlm-resize")


# A forked process has none of its parent's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_threads.cache_clear)


class Resize:
    """Bilinear and antialiased, to a square; called by DALI with a batch of uint8 (H, W, 3).

    Gives uint8 (3, S, S) with `planes`, else (S, S, 3).
    """

    def __init__(self, side: int, threads: int, *, planes: bool):
        self._side, self._count, self._planes = side, threads, planes
        self.layout = "CHW" if planes else "HWC"

    def __call__(self, batch: Any) -> list[UInt8]:
        windows = [np.asarray(window) for window in batch]
        shares = [windows[k :: self._count] for k in range(self._count)]
        if self._count == 1:
            return self._all(windows)
        done: list[Any] = [None] * len(windows)
        # torch lets other threads run while it resizes.
        for k, share in enumerate(_threads(self._count).map(self._all, shares)):
            done[k :: self._count] = share
        return done

    def _all(self, windows: list[UInt8]) -> list[UInt8]:
        return [self._one(window) for window in windows]

    def _one(self, window: UInt8) -> UInt8:
        size = (self._side, self._side)
        # No copy by torch on these threads: each would open an OpenMP team (see `buffers.copy_on_this_thread`). torch
        # copies where nothing is to be resized, and where the result has to be laid out in another way.
        if window.shape[:2] == size:
            return np.ascontiguousarray(window.transpose(2, 0, 1) if self._planes else window)
        pixels = torch.from_numpy(window)
        # (1, 3, H, W), channels last in memory. torch gives planes in the first form, channels last in the second.
        pixels = pixels.permute(2, 0, 1)[None] if self._planes else pixels[None].permute(0, 3, 1, 2)
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0]
        return np.ascontiguousarray((pixels if self._planes else pixels.permute(1, 2, 0)).numpy())
