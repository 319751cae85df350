"""Recycled buffers for image batches.

A batch of images takes megabytes and stays alive until its consumer drops it. malloc would fragment the heap, and fresh
mmap pages cost several times the copy.
"""

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Puts uint8 tensors into recycled memory. It is reused when the last reference to a tensor or its views is gone.

    Args:
        spare: number of idle buffers to keep.
    """

    def __init__(self, spare: int = 8):
        self._spare: deque[mmap.mmap] = deque(maxlen=spare)

    def __len__(self) -> int:
        """Number of idle buffers."""
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
