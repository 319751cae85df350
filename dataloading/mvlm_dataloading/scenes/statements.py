"""Statements about two images, in the manner of NLVR2: each with four pairs of images, two of which make it true.

The same images appear in true and in false pairs wherever the statement allows it, often only exchanged, so neither the
statement nor one image decides.
"""

import random
from dataclasses import replace

from .kinds import SIDES, plural, with_article
from .layout import MOST, Scene, beside, place
from .samples import Family, Sample, asked_kind, compose, fillers, other_kind, same_colour
from .vocabulary import Vocabulary

Pair = tuple[Scene, Scene]


def make_statements(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """At least `count` pairs of images with a statement. The four of a statement follow each other and share a set."""
    families: dict[str, Family] = {
        "only": only_one_side,
        "both": both,
        "one": exactly_one,
        "more": more,
        "relation": related,
    }
    if vocabulary.tints:
        families["same colour"] = same_colours
    samples = compose(families, seed, vocabulary, count)
    return [
        replace(sample, metadata={**sample.metadata, "set_id": number // 4, "pair": number % 4})
        for number, sample in enumerate(samples)
    ]


def only_one_side(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Presence in the named image and absence in the other."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    side = rng.choice(("left", "right"))
    left = [(here, without_too), (here_too, without)]
    right = [(b, a) for a, b in left]
    statement = f"only the {side} image shows {text}"
    return _judged(rng, "only", statement, *((left, right) if side == "left" else (right, left)))


def both(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Presence in both images."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    true, false = [(here, here_too), (here_too, here)], [(here, without_too), (without, here_too)]
    return _judged(rng, "both", f"both images show {text}", true, false)


def exactly_one(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Presence in one image and not in the other: each image is in a true and in a false pair on each side."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    true, false = [(here, without_too), (without, here_too)], [(here, here_too), (without, without_too)]
    return _judged(rng, "one", f"exactly one of the images shows {text}", true, false)


def more(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Numbers of a kind in two images that differ by one or two."""
    kind = asked_kind(rng, vocabulary)
    pairs: list[Pair] = []
    for _ in range(2):
        few, many = sorted(rng.sample(range(1, 5), 2))
        two = []
        for count in (many, few):
            near = [other_kind(rng, vocabulary, kind)] if kind.colour else []
            others = near + fillers(rng, vocabulary, rng.randint(0, 2), {kind.name})
            two.append(place(rng, [*[kind] * count, *others][:MOST]))
        pairs.append((two[0], two[1]))
    side, other = rng.choice((("left", "right"), ("right", "left")))
    exchanged = [(b, a) for a, b in pairs]
    statement = f"the {side} image has more {plural(kind.text)} than the {other} image"
    return _judged(rng, "more", statement, *((pairs, exchanged) if side == "left" else (exchanged, pairs)))


def related(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Side of a noun in both images; in a false pair the two nouns are exchanged in one image."""
    subject = rng.choice(vocabulary.subjects)
    side = rng.choice(vocabulary.sides(subject))
    anchor = rng.choice([kind for kind in vocabulary.anchors if kind != subject])
    found: list[Pair] = []
    for _ in range(2):
        one, other, _ = beside(rng, side)
        others = fillers(rng, vocabulary, rng.randint(1, 3), {subject.name, anchor.name})
        scene = place(rng, [subject, anchor, *others], [one, other])
        found.append((scene, scene.swapped(0, 1)))
    (first, not_first), (second, not_second) = found
    statement = f"in both images the {subject.text} is {SIDES[side]} the {anchor.text}"
    true, false = [(first, second), (second, first)], [(first, not_second), (not_first, second)]
    return _judged(rng, "relation", statement, true, false)


def same_colours(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Equality of the colours of a shape in two images."""
    one = rng.choice(vocabulary.tints)
    other = rng.choice([tint for tint in vocabulary.tints if tint.name == one.name and tint != one])
    first, second = (place(rng, [one, *fillers(rng, vocabulary, rng.randint(1, 3), {one.name})]) for _ in range(2))
    not_first, not_second = first.with_kind(0, other), second.with_kind(0, other)
    statement = f"the {plural(one.name)} in the two images have the same colour"
    true, false = [(first, second), (not_first, not_second)], [(first, not_second), (not_first, second)]
    return _judged(rng, "same colour", statement, true, false)


def _present(rng: random.Random, vocabulary: Vocabulary) -> tuple[Pair, Pair, str]:
    """Two pairs of a scene with a kind and the same scene without it, and the kind's text."""
    kind = asked_kind(rng, vocabulary)
    pairs: list[Pair] = []
    for _ in range(2):
        near = same_colour(rng, vocabulary, kind) if kind.colour else []
        edit = other_kind(rng, vocabulary, kind)
        names = {kind.name, edit.name, *(other.name for other in near)}
        others = near + fillers(rng, vocabulary, rng.randint(1, 3), names)
        scene = place(rng, [kind, *others])
        pairs.append((scene, scene.with_kind(0, edit)))
    return pairs[0], pairs[1], with_article(kind.text)


def _judged(rng: random.Random, family: str, statement: str, true: list[Pair], false: list[Pair]) -> list[Sample]:
    rows = [(pair, "true") for pair in true] + [(pair, "false") for pair in false]
    rng.shuffle(rows)
    return [Sample(pair, (statement,), {"images": 2, "label": label, "statement_type": family}) for pair, label in rows]
