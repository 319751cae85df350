"""Kinds that the texts of a split may ask about, and those that may stand beside them."""

from collections.abc import Collection
from dataclasses import dataclass

from .kinds import HELD_COLOURS, NOUNS, SHAPES, SIDES, Kind, held_side, is_unseen

SPLITS = ("train", "validation", "test", "combo", "concept", "artist")
"""Splits of each task."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The kinds of a split's scenes and texts."""

    nouns: tuple[Kind, ...]
    """Nouns that texts ask about."""
    tints: tuple[Kind, ...]
    """Shapes with their colours that texts ask about."""
    subjects: tuple[Kind, ...]
    """Nouns that stand on a side of another: "the SUBJECT is left of the anchor"."""
    anchors: tuple[Kind, ...]
    """Nouns that others stand beside."""
    fill: tuple[Kind, ...]
    """Kinds that may be in any scene of the split."""
    held_sides: bool = False
    """True if subjects stand on their held-out side, False if they never do."""

    @property
    def asked(self) -> tuple[Kind, ...]:
        return self.nouns + self.tints

    @property
    def all_tints(self) -> tuple[Kind, ...]:
        """Shapes with colours that may be in a scene."""
        return tuple(dict.fromkeys((*self.tints, *(kind for kind in self.fill if kind.colour))))

    def stands(self, subject: str, side: str) -> bool:
        """True if a text of the split may say that a `subject` is on this side of something."""
        return (held_side(subject) == side) == self.held_sides

    def sides(self, subject: Kind) -> list[str]:
        return [side for side in SIDES if self.stands(subject.name, side)]


def vocabulary(split: str, drawn: Collection[str]) -> Vocabulary:
    """Kinds of a split.

    Args:
        drawn: texts of the kinds that the split's artwork has.
    """
    nouns = tuple(Kind(noun) for noun in NOUNS if noun in drawn)
    tints = tuple(Kind(shape, colour) for shape, colours in SHAPES.items() for colour in colours)
    tints = tuple(tint for tint in tints if tint.text in drawn)
    seen = tuple(noun for noun in nouns if not is_unseen(noun.name))
    unseen = tuple(noun for noun in nouns if is_unseen(noun.name))
    books = tuple(tint for tint in tints if tint.name == "book")
    held = tuple(tint for tint in tints if tint.colour in HELD_COLOURS.get(tint.name, ()))
    plain = tuple(tint for tint in tints if tint not in books and tint not in held)
    if split == "combo":
        return Vocabulary((), held, seen, seen, seen + plain, held_sides=True)
    if split == "concept":
        return Vocabulary(unseen, books, seen, unseen, seen + plain)
    return Vocabulary(seen, plain, seen, seen, seen + plain)
