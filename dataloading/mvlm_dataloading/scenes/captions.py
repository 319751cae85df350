"""Captions of scenes: what is there, how many of it, in which colour, and on which side of what."""

import random

from .kinds import NUMBERS, SIDES, Kind, plural, with_article
from .layout import MOST, Placed, Scene, is_beside, place
from .samples import Sample, asked_kind, compose, fillers, other_kind
from .vocabulary import Vocabulary


def make_captions(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """`count` scenes with three to five captions each."""
    return compose({"scene": described}, seed, vocabulary, count)


def described(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """A scene of one to four kinds, one of them a kind that the split asks about."""
    kind = asked_kind(rng, vocabulary)
    kinds = [kind, *fillers(rng, vocabulary, rng.randint(0, 3), {kind.name})]
    if kind.colour and rng.random() < 0.3:
        kinds = [kind, other_kind(rng, vocabulary, kind), *kinds[1:3]]
    room, numbers = MOST - len(kinds), []
    for _ in kinds:
        more = rng.choice((0, 0, 1, 2))
        numbers.append(1 + min(more, room))
        room -= numbers[-1] - 1
    objects = [kind for kind, number in zip(kinds, numbers, strict=True) for _ in range(number)]
    scene = place(rng, objects)
    return [Sample((scene,), tuple(captions_of(rng, vocabulary, scene)))]


def make_names(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """`count` scenes of one object each, with captions that name it."""
    return compose({"name": named}, seed, vocabulary, count)


def named(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """A scene of one object, of any kind that the split asks about."""
    scene = place(rng, [rng.choice(vocabulary.asked)])
    return [Sample((scene,), tuple(captions_of(rng, vocabulary, scene)))]


def captions_of(rng: random.Random, vocabulary: Vocabulary, scene: Scene) -> list[str]:
    """Three captions that list all objects, and up to two that tell a side."""
    counts: dict[Kind, int] = {}
    for one in scene.objects:
        counts[one.kind] = counts.get(one.kind, 0) + 1

    def listed() -> tuple[str, bool]:
        kinds = rng.sample(sorted(counts, key=lambda kind: kind.text), len(counts))
        texts = [
            with_article(kind.text) if counts[kind] == 1 else f"{NUMBERS[counts[kind]]} {plural(kind.text)}"
            for kind in kinds
        ]
        return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts), counts[kinds[0]] > 1

    (first, _), (second, several), (third, _) = listed(), listed(), listed()
    captions = [first, f"there {'are' if several else 'is'} {second}", f"an image of {third}"]
    alone = [one for one in scene.objects if counts[one.kind] == 1]
    told = [
        (one.kind.text, SIDES[side], other.kind.text)
        for one in alone
        for other in alone
        for side in SIDES
        if other.kind != one.kind and _aligned(one, other) and is_beside(one, side, other)
        if one.kind.colour or vocabulary.stands(one.kind.name, side)
    ]
    if told:
        one, side, other = rng.choice(told)
        captions.append(f"{with_article(one)} {side} {with_article(other)}")
        one, side, other = rng.choice(told)
        captions.append(f"{listed()[0]}, where the {one} is {side} the {other}")
    return captions


def _aligned(one: Placed, other: Placed) -> bool:
    return one.row == other.row or one.column == other.column
