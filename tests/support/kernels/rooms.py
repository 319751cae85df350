"""A GPU's room for saved GELUs, for tensors on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

from mvlm_kernels.gelu_linear import room
from mvlm_kernels.gelu_linear.room import SHARE, Held, Room


class Sizes(Room):
    """Room for saved GELUs in which all fit. sizes: bytes of each GELU that was to be saved, in order."""

    def __init__(self) -> None:
        super().__init__(lambda: 1 << 40)
        self.sizes: list[int] = []
        _measure(self)

    def take(self, size: int) -> Held | None:
        self.sizes.append(size)
        return super().take(size)


def _measure(found: Room) -> None:
    for _ in range(2):
        found.note_update()
        Room.take(found, 0)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside the block, GELUs of `size` bytes together are saved for backward, by the rule for GPUs, also on a CPU."""
    found = Room(lambda: int(size / SHARE) + 1)
    _measure(found)
    with patch.object(room, "room_of", lambda _: found):
        yield


def every_room(step: Callable[[], object]) -> list[int]:
    """Bytes for none, for the first, for the first two ... of the GELUs that a step saves, and sizes in between.

    step: runs forward and backward without activation checkpointing.
    """
    found = Sizes()
    with patch.object(room, "room_of", lambda _: found):
        step()
    sums = [sum(found.sizes[:number]) for number in range(len(found.sizes) + 1)]
    return sorted({*sums, *((a + b) // 2 for a, b in pairwise(sums)), sums[-1] + 1000})
