"""Recycled buffers for image batches.

A batch of images takes megabytes and stays alive until its consumer drops it. malloc would fragment the heap, and fresh
mmap pages cost several times the copy.
"""

import ctypes
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Copies uint8 tensors into recycled memory. It is reused when the last reference to a copy or its views is gone.

    Args:
        spare: number of idle buffers to keep.
    """

    def __init__(self, spare: int = 8):
        self._spare: deque[mmap.mmap] = deque(maxlen=spare)

    def __len__(self) -> int:
        """Number of idle buffers."""
        return len(self._spare)

    def copy(self, source: Tensor) -> Tensor:
        """A copy of a nonempty uint8 CPU tensor of any shape."""
        buffer = self._spare.pop() if self._spare else None
        if buffer is None or len(buffer) < source.nbytes:
            # MAP_PRIVATE: a forked process keeps the content that it had at the fork.
            buffer = mmap.mmap(-1, source.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Only the tensor holds the handle, so the handle dies with the tensor and its last view.
        handle = (ctypes.c_uint8 * source.nbytes).from_buffer(buffer)
        weakref.finalize(handle, self._spare.append, buffer).atexit = False
        copy = torch.frombuffer(handle, dtype=torch.uint8).view(source.shape)
        copy_on_this_thread(copy, source)
        return copy


def copy_on_this_thread(target: Tensor, source: Tensor) -> None:
    """Copy a CPU tensor into another of the same shape, with numpy.

    torch's `copy_` opens an OpenMP team for each thread that calls it. With a second team in the process, libgomp
    counts more threads than cores, so the training step's threads sleep between operations instead of spinning. On two
    cores, this made training of `tiny` a quarter slower.
    """
    np.copyto(target.numpy(), source.numpy())
