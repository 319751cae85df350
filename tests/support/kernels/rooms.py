"""A GPU's room for saved GELUs, for tensors on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

from mvlm_kernels.gelu_linear import room
from mvlm_kernels.gelu_linear.room import SHARE, Held, Room


class Sizes(Room):
    """Room for all GELUs. sizes: bytes of each that has asked."""

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
    """Tensors on the CPU have room for GELUs of so many bytes, as on a GPU after its first steps."""
    found = Room(lambda: int(size / SHARE) + 1)
    _measure(found)
    with patch.object(room, "room_of", lambda _: found):
        yield


def every_room(step: Callable[[], object]) -> list[int]:
    """Rooms in bytes: for none of the GELUs that a step without checkpointing saves, for each number, and between."""
    found = Sizes()
    with patch.object(room, "room_of", lambda _: found):
        step()
    sums = [sum(found.sizes[:number]) for number in range(len(found.sizes) + 1)]
    return sorted({*sums, *((a + b) // 2 for a, b in pairwise(sums)), sums[-1] + 1000})
