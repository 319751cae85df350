"""Questions about what is where in a scene: on a place of the image, and on a side of another object.

They teach which word belongs to which patch. The answers of a text are not balanced.
"""

import random

from .kinds import SIDES
from .layout import Scene, is_beside, place
from .questions import asked
from .samples import Sample, asked_kind, compose, fillers
from .vocabulary import Vocabulary

PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
"""Cells of the grid in words."""
MOST_RELATIONS = 3
"""Most questions of a scene about sides."""


def make_places(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """At least `count` questions, all of whole scenes."""
    return compose({"place": what_is_where}, seed, vocabulary, count)


def make_training_places(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """The questions of `count` scenes."""
    scenes = (what_is_where(random.Random(f"{seed} scene {number}"), vocabulary) for number in range(count))
    return [sample for questions in scenes for sample in questions]


def what_is_where(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """A scene of two to five kinds: a question for the place of each, and up to three for what is beside another."""
    first = asked_kind(rng, vocabulary)
    scene = place(rng, [first, *fillers(rng, vocabulary, rng.choice((1, 2, 3, 3, 4)), {first.name})])
    sides = _relations(vocabulary, scene)
    return [asked("place", f"what is {PLACES[one.cell]}?", one.kind.text, scene) for one in scene.objects] + rng.sample(
        sides, min(len(sides), MOST_RELATIONS)
    )


def _relations(vocabulary: Vocabulary, scene: Scene) -> list[Sample]:
    """A question for each side of each object on which there is exactly one other."""
    found = []
    for anchor in scene.objects:
        for side, words in SIDES.items():
            there = [one.kind for one in scene.objects if is_beside(one, side, anchor)]
            if len(there) == 1 and (there[0].colour or vocabulary.stands(there[0].name, side)):
                found.append(asked("relation", f"what is {words} the {anchor.kind.text}?", there[0].text, scene))
    return found
