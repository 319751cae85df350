"""Which GELUs are saved for backward: all on a CPU, on a GPU those for which earlier steps left room."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mvlm_kernels import dispatch

SHARE = 0.9
"""Share of a GPU's memory up to which a step may grow by saved GELUs. The rest is for steps with longer texts, and for
memory that is free in pieces."""

_saves = True


@contextmanager
def saving_none() -> Iterator[None]:
    """Save no GELU for backward inside the block, in all threads: less memory, and backward computes the GELU again."""
    global _saves
    before, _saves = _saves, False
    try:
        yield
    finally:
        _saves = before


class Room:
    """Room for saved GELUs on one GPU: what earlier steps left free, by the allocator's peak. The first saves none."""

    def __init__(self, read: Callable[[], tuple[int, int]]) -> None:
        """read: returns the bytes allocated at the peak so far, and those of the GPU."""
        self._read, self._lock = read, threading.RLock()  # a collection in between may call Held.__del__
        self._room = self._held = self._most = self._others = 0
        self._backward_ran = False

    def take(self, size: int) -> "Held | None":
        """Bytes of a GELU that is saved from now on, or None if they do not fit."""
        with self._lock:
            if self._backward_ran and not self._held:  # the first call of a step
                peak, total = self._read()
                self._others = max(self._others, peak - self._most)
                self._room, self._backward_ran = int(SHARE * total) - self._others, False
            if self._held + size > self._room:
                return None
            self._held += size
            self._most = max(self._most, self._held)
        return Held(self, size)

    def give_back(self, size: int) -> None:
        """Note that a backward pass ran, and the bytes that it no longer needs."""
        with self._lock:
            self._held -= size
            self._backward_ran = True


class Held:
    """Bytes of one saved GELU. They are given back when its backward pass has run, or nobody can run it any more."""

    def __init__(self, room: Room, size: int) -> None:
        self._room, self._size = room, size

    def release(self) -> None:
        size, self._size = self._size, 0
        self._room.give_back(size)

    def __del__(self) -> None:
        if self._size:
            self.release()


@functools.cache
def _room(index: int) -> Room:
    total = torch.cuda.get_device_properties(index).total_memory
    return Room(lambda: (torch.cuda.max_memory_allocated(index), total))


def room_of(device: torch.device) -> Room | None:
    """Room of a GPU; None for other devices, and under a compiler."""
    return _room(device.index) if device.type == "cuda" and not torch.compiler.is_compiling() else None


def save(gelu: Tensor) -> "tuple[bool, Held | None]":
    """Whether a GELU is saved for backward, and on a GPU what it holds of the room."""
    if not _saves:
        return False, None
    room = room_of(gelu.device)
    if room is None:
        return gelu.device.type == "cpu" and dispatch.forced() != "triton", None
    # Checkpointing runs the forward pass again under hooks and wants as many saved tensors. The room has changed then.
    if torch._C._autograd._top_saved_tensors_default_hooks(True):  # pyright: ignore[reportAttributeAccessIssue]
        return False, None
    held = room.take(gelu.nbytes)
    return held is not None, held
