"""Phrases for one object of a scene, with objects beside it that answer to half of the phrase.

A phrase is asked of two scenes in which the object and a distractor are exchanged, so no place in the image is a good
guess for a phrase.
"""

import random
from functools import cache
from itertools import permutations

from .kinds import SIDES, Kind, with_article
from .layout import CELLS, Placed, is_beside, place
from .samples import Sample, asked_kind, compose, fillers, other_kind, same_colour
from .vocabulary import Vocabulary


def make_phrases(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """At least `count` phrases with an image each; metadata `target` is the number of the object meant."""
    return compose({"kind": named, "relation": related}, seed, vocabulary, count)


def named(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """A noun beside another one, or a coloured shape beside the same shape and beside the same colour."""
    kind = asked_kind(rng, vocabulary)
    near = [other_kind(rng, vocabulary, kind), *(same_colour(rng, vocabulary, kind) if kind.colour else [])]
    names = {kind.name, *(one.name for one in near)}
    others = near + fillers(rng, vocabulary, rng.randint(1, 2 if kind.colour else 3), names)
    scene = place(rng, [kind, *others])
    text = rng.choice((f"the {kind.text}", with_article(kind.text)))
    return [
        Sample((scene,), (text,), {"target": 0, "phrase_type": "kind"}),
        Sample((scene.swapped(0, 1),), (text,), {"target": 1, "phrase_type": "kind"}),
    ]


def related(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """One of two equal nouns, the one on a side of a third object."""
    subject = rng.choice(vocabulary.subjects)
    side = rng.choice(vocabulary.sides(subject))
    anchor = rng.choice([kind for kind in vocabulary.anchors if kind != subject])
    cells = rng.choice(_triples(side))
    others = fillers(rng, vocabulary, rng.randint(0, 2), {subject.name, anchor.name})
    scene = place(rng, [subject, subject, anchor, *others], cells)
    text = f"the {subject.text} {SIDES[side]} the {anchor.text}"
    return [Sample((scene,), (text,), {"target": 0, "phrase_type": "relation"})]


@cache
def _triples(side: str) -> list[tuple[int, int, int]]:
    """Cells of an object on this side of a third, of one that is not, and of the third."""
    at = [Placed(Kind(""), cell, 1, (0, 0)) for cell in range(CELLS)]
    return [
        (one, other, third)
        for one, other, third in permutations(range(CELLS), 3)
        if is_beside(at[one], side, at[third]) and not is_beside(at[other], side, at[third])
    ]
