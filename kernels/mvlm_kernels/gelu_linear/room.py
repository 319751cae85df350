"""Choice of the GELUs that are saved for backward: all on a CPU, on a GPU those for which earlier steps left room."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from mvlm_kernels import dispatch

SHARE = 0.8
"""Share of a GPU's free memory that saved GELUs may take. The rest is for steps with longer texts, and for memory that
is free in pieces."""

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
    """Room for saved GELUs on one GPU: `SHARE` of what a step without them leaves free.

    It is measured once, so that steps of equal shapes save the same GELUs: in the first step after two updates of the
    weights. The step between these two is the first that has the optimizer's state in memory. Until then none is saved.
    """

    def __init__(self, left_free: Callable[[], int]) -> None:
        """left_free: returns the bytes that the steps so far have left free on the GPU."""
        self._left_free, self._lock = left_free, threading.RLock()  # a collection in between may call Held.__del__
        self._updated = False
        self._updates = self._held = 0
        self._room: int | None = None

    def note_update(self) -> None:
        """Note that an optimizer has updated weights. Several that do so before the next step count as one."""
        self._updated = True

    def take(self, size: int) -> "Held | None":
        """Take `size` bytes for a GELU that is saved, and return the object that gives them back.

        Returns None if they do not fit, or if the room has not been measured yet.
        """
        with self._lock:
            if self._room is None:
                self._updates, self._updated = self._updates + self._updated, False
                if self._updates < 2:
                    return None
                self._room = int(SHARE * self._left_free())
            if self._held + size > self._room:
                return None
            self._held += size
        return Held(self, size)

    def give_back(self, size: int) -> None:
        """Count the `size` bytes of a saved GELU as free again."""
        with self._lock:
            self._held -= size


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


def _left_free(index: int) -> int:
    """Bytes of GPU number `index` that were free at the peak of memory so far, processes of others counted too."""
    # What torch's allocator held then and has given back since is wanted again.
    given_back = torch.cuda.max_memory_reserved(index) - torch.cuda.memory_reserved(index)
    return torch.cuda.mem_get_info(index)[0] - given_back


@functools.cache
def _room(index: int) -> Room:
    room = Room(lambda: _left_free(index))
    register_optimizer_step_post_hook(lambda *_: room.note_update())
    return room


def room_of(device: torch.device) -> Room | None:
    """Room for saved GELUs on a GPU; None for other devices, and while torch.compile traces."""
    return _room(device.index) if device.type == "cuda" and not torch.compiler.is_compiling() else None


def save(gelu: Tensor) -> "tuple[bool, Held | None]":
    """Decide whether a GELU is saved for backward, and on a GPU take its bytes from the room."""
    if not _saves:
        return False, None
    room = room_of(gelu.device)
    if room is None:
        return gelu.device.type == "cpu" and dispatch.forced() != "triton", None
    # Checkpointing runs the forward pass again under hooks and wants as many saved tensors. The room has changed then.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks or (gelu.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph holds for good what it saves
        return False, None
    held = room.take(gelu.nbytes)
    return held is not None, held
