"""Memory for one batch's pictures after another.

A batch's pictures are megabytes that live until the consumer lets go of them. From malloc they would leave holes of
that size for what is small and stays; pages fresh from the system cost several times the copying.
"""

import ctypes
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Pages:
    """Copies uint8 tensors into memory that is used again as soon as nothing refers to the copy, nor to a view of it.

    Args:
        spare: how many pieces of memory to keep for copies to come.
    """

    def __init__(self, spare: int = 8):
        self._spare: deque[mmap.mmap] = deque(maxlen=spare)

    def copy(self, source: Tensor) -> Tensor:
        """A copy of a uint8 tensor on the CPU, of any shape that is not empty."""
        pages = self._spare.pop() if self._spare else None
        if pages is None or len(pages) < source.nbytes:
            # Private: a forked process keeps what it had when it was forked.
            pages = mmap.mmap(-1, source.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The tensor holds the handle, and nothing else does: so it goes when the tensor and its views have gone.
        handle = (ctypes.c_uint8 * source.nbytes).from_buffer(pages)
        weakref.finalize(handle, self._spare.append, pages).atexit = False
        copy = torch.frombuffer(handle, dtype=torch.uint8).view(source.shape)
        copy_on_this_thread(copy, source)
        return copy


def copy_on_this_thread(target: Tensor, source: Tensor) -> None:
    """Copy a CPU tensor into another of the same shape, with numpy.

    torch's `copy_` opens an OpenMP team for each thread that calls it. With a second team in the process libgomp counts
    more threads than cores, so the threads of the training step sleep between operations instead of spinning: on two
    cores, a run of `tiny` lost a quarter of its pairs a second.
    """
    np.copyto(target.numpy(), source.numpy())
