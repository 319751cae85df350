"""Images on a GPU between DALI, the loader's thread and the training step: who owns one until the device has read it.

NOTE: DALI frees and overwrites its memory in the order of its own stream, as soon as Python drops an output. A kernel
that another stream has only queued may then read other pixels, without an error. So

1. `owned` copies DALI's output to memory of torch, and returns when the device has made the copy;
2. the loader's thread works on the copy inside `working`, which ends when the device has done the work;
3. `hand_over` tells torch's allocator that the consumer's stream reads it: it is not used again before that.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def working(device: torch.device) -> Iterator[None]:
    """Context for work of the loader on this device, which is done when the block ends.

    On a GPU a stream of its own runs it, beside what is queued for the training step.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device)):
        try:
            yield
        finally:
            _stream(device).synchronize()


def owned(output: Any, device: torch.device) -> Tensor:
    """Copy an output of DALI into a torch tensor on this device. DALI may overwrite its own memory from now on."""
    with working(device):
        return torch.from_dlpack(output).clone()


def hand_over(x: Tensor) -> None:
    """Tell torch's allocator that the current CUDA stream of the calling thread reads `x`.

    After x is freed, its memory is reused only when the stream has done what was queued before.
    """
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
