"""Layout of scenes: up to five objects on a grid of nine cells, which shift a little and never overlap.

Sides are columns and rows: an object is left of another if its column is. Centres in neighbouring columns differ by
more than a quarter of the image, those within a column by less than a tenth of it, so no pair is in doubt.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .vocabulary import Kind

SIDE = 128
"""Side of the image in pixels."""
CELLS, MOST = 9, 5
CENTRES = (21, 64, 107)
CARD = 44
"""Side of the card that hides a cell, in pixels. It covers any object of the cell and touches none of another."""
GROUNDS = 24
"""Number of backgrounds."""
_SMALLEST, _LARGEST, _ROOM, _SHIFT = 32, 40, 42, 5


@dataclass(frozen=True, slots=True)
class Placed:
    """An object of a scene and its place."""

    kind: Kind
    cell: int
    """Cell of the 3 x 3 grid, 0 to 8, row by row."""
    size: int
    """Longer side of the drawn object in pixels."""
    shift: tuple[int, int]
    """Offset of its centre from the cell's, x and y in pixels."""

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


@dataclass(frozen=True, slots=True)
class Scene:
    """A background, objects on it, and possibly a grey card over one cell."""

    ground: int
    objects: tuple[Placed, ...]
    card: int | None = None

    def with_kind(self, number: int, kind: Kind) -> "Scene":
        """A copy of the scene in which object `number` is of another kind: the smallest edit."""
        objects = list(self.objects)
        objects[number] = replace(objects[number], kind=kind)
        return replace(self, objects=tuple(objects))

    def swapped(self, one: int, other: int) -> "Scene":
        """A copy of the scene in which two objects, given by their numbers, have exchanged their kinds."""
        kinds = self.objects[one].kind, self.objects[other].kind
        return self.with_kind(one, kinds[1]).with_kind(other, kinds[0])


def place(rng: random.Random, kinds: Sequence[Kind], cells: Sequence[int] = ()) -> Scene:
    """Make a scene of these kinds of objects in random cells. The first objects are in the given `cells`."""
    assert len(kinds) <= MOST
    free = [cell for cell in range(CELLS) if cell not in cells]
    taken = [*cells, *rng.sample(free, len(kinds) - len(cells))]
    objects = []
    for kind, cell in zip(kinds, taken, strict=True):
        size = rng.randint(_SMALLEST, _LARGEST)
        most = min(_SHIFT, (_ROOM - size) // 2)
        objects.append(Placed(kind, cell, size, (rng.randint(-most, most), rng.randint(-most, most))))
    return Scene(rng.randrange(GROUNDS), tuple(objects))


def is_beside(one: Placed, side: str, other: Placed) -> bool:
    """True if the object `one` is on a side (left, right, above or below) of `other`, by column or by row."""
    across = {"left": other.column - one.column, "right": one.column - other.column}
    return ({"above": other.row - one.row, "below": one.row - other.row} | across)[side] > 0


def beside(rng: random.Random, side: str) -> tuple[int, int, list[int]]:
    """Draw two cells so that the first, the subject's, is on a side of the second, the anchor's, in one row or column.

    Returns them, and the other cells that are not on this side of the anchor.
    """
    line, two = rng.randrange(3), sorted(rng.sample(range(3), 2))
    subject, anchor = two if side in ("left", "above") else reversed(two)
    if side in ("left", "right"):
        cells = 3 * line + subject, 3 * line + anchor
    else:
        cells = 3 * subject + line, 3 * anchor + line
    at = [Placed(Kind(""), cell, _SMALLEST, (0, 0)) for cell in range(CELLS)]
    others = [cell for cell in range(CELLS) if cell not in cells and not is_beside(at[cell], side, at[cells[1]])]
    return *cells, others


def boxes(scene: Scene, shapes: Mapping[str, tuple[int, int]]) -> list[list[int]]:
    """Box [x, y, width, height] of each object in pixels.

    shapes: width and height of each kind's artwork, by `Kind.text`.
    """
    found = []
    for one in scene.objects:
        wide, high = shapes[one.kind.text]
        scale = one.size / max(wide, high)
        wide, high = max(1, round(wide * scale)), max(1, round(high * scale))
        x, y = CENTRES[one.column] + one.shift[0], CENTRES[one.row] + one.shift[1]
        found.append([x - wide // 2, y - high // 2, wide, high])
    return found


def card_box(cell: int) -> tuple[int, int, int, int]:
    """Left, top, right and lower edge in pixels of the grey card over a cell."""
    x, y = CENTRES[cell % 3] - CARD // 2, CENTRES[cell // 3] - CARD // 2
    return max(0, x), max(0, y), min(SIDE, x + CARD), min(SIDE, y + CARD)
