"""Hypotheses about scenes, each with three images: one entails it, one contradicts it, one leaves it open.

A grey card hides part of every image. Where it hides what the hypothesis speaks of, the image leaves it open; elsewhere
it hides another object. That there is a card therefore tells nothing. Where it lies tells a little, because fillers are
in other places than what is asked about: the image alone is right on up to 40 % (`docs/evidence/tasks.md`).
"""

import random
from dataclasses import replace

from .kinds import SIDES, with_article
from .layout import Scene, beside, place
from .samples import Family, Sample, asked_kind, compose, fillers, other_kind
from .vocabulary import Vocabulary

PLACES = {
    0: "in the top left corner",
    2: "in the top right corner",
    4: "in the middle",
    6: "in the bottom left corner",
    8: "in the bottom right corner",
}
"""Cells that have a name."""


def make_hypotheses(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """At least `count` hypotheses with an image each, evenly of the families that the vocabulary allows."""
    families: dict[str, Family] = {"place": placed, "relation": related}
    return compose(families | ({"colour": coloured} if vocabulary.tints else {}), seed, vocabulary, count)


def placed(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Kind of the object in a named place."""
    kind, cell = asked_kind(rng, vocabulary), rng.choice(tuple(PLACES))
    edit = other_kind(rng, vocabulary, kind)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {kind.name, edit.name})
    scene = place(rng, [kind, *others], [cell])
    text = f"{with_article(kind.text)} is {PLACES[cell]}"
    return _judged(rng, "place", text, scene, scene.with_kind(0, edit), asked=(0,))


def related(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Side of a noun; in the contradicting image the two nouns are exchanged, in the open one a card hides one."""
    subject = rng.choice(vocabulary.subjects)
    side = rng.choice(vocabulary.sides(subject))
    anchor = rng.choice([kind for kind in vocabulary.anchors if kind != subject])
    one, other, _ = beside(rng, side)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {subject.name, anchor.name})
    scene = place(rng, [subject, anchor, *others], [one, other])
    text = f"the {subject.text} is {SIDES[side]} the {anchor.text}"
    return _judged(rng, "relation", text, scene, scene.swapped(0, 1), asked=(0, 1))


def coloured(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Colour of the only object of a shape."""
    kind = rng.choice(vocabulary.tints)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {kind.name})
    scene = place(rng, [kind, *others])
    text = f"the {kind.name} is {kind.colour}"
    return _judged(rng, "colour", text, scene, scene.with_kind(0, other_kind(rng, vocabulary, kind)), asked=(0,))


def _judged(
    rng: random.Random, family: str, text: str, true: Scene, false: Scene, asked: tuple[int, ...]
) -> list[Sample]:
    """The hypothesis with its three images. `asked`: numbers of the objects that it speaks of."""
    beyond = rng.choice([one.cell for number, one in enumerate(true.objects) if number not in asked])
    hidden = true.objects[rng.choice(asked)].cell
    unknown = rng.choice((true, false))  # what is behind the card may be either
    rows = [
        ("entailment", replace(true, card=beyond)),
        ("contradiction", replace(false, card=beyond)),
        ("neutral", replace(unknown, card=hidden)),
    ]
    return [Sample((scene,), (text,), {"label": label, "hypothesis_type": family}) for label, scene in rows]
