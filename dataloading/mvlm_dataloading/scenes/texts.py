"""Texts about scenes: captions and names, hypotheses, and statements about two images.

A sample is a text with its scenes, before they are drawn. Texts with an answer are made in blocks in which every text
has each of its answers equally often.

- A hypothesis has three images: one entails it, one contradicts it, one leaves it open. A grey card hides part of every
  image. Where it hides what the hypothesis speaks of, the image leaves it open; elsewhere it hides another object. That
  there is a card therefore tells nothing. Where it lies tells a little, because fillers are in other places than what
  is asked about: the image alone is right on up to 40 % (`docs/evidence/tasks.md`).
- A statement about two images, in the manner of NLVR2, has four pairs of images, two of which make it true. The same
  images appear in true and in false pairs wherever the statement allows it, often only exchanged, so neither the
  statement nor one image decides.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .layout import MOST, SIDE, Placed, Scene, beside, card_box, is_beside, place
from .vocabulary import NUMBERS, SIDES, Kind, Vocabulary, plural, with_article


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a task: its scenes, side by side in its image, its texts, and its metadata."""

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


Family = Callable[[random.Random, Vocabulary], list[Sample]]
"""Makes a block of samples in which every text has each of its answers equally often."""


def compose(families: Mapping[str, Family], seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Make at least `count` samples, in whole blocks that come evenly from all families.

    families: functions that make a block, by their names, which are part of the seed.
    """
    made = dict.fromkeys(families, 0)
    samples: list[Sample] = []
    while len(samples) < count:
        family = min(made, key=lambda name: made[name])
        rng = random.Random(f"{seed} {family} {made[family]}")  # a hash of the text, the same on every machine
        block = families[family](rng, vocabulary)
        made[family] += len(block)
        samples += block
    return samples


def fillers(rng: random.Random, vocabulary: Vocabulary, count: int, without: Iterable[str]) -> list[Kind]:
    """Draw `count` further kinds for a scene, with different names: half of them coloured shapes, if there are any."""
    names, found = set(without), []
    for _ in range(count):
        free = [kind for kind in vocabulary.fill if kind.name not in names]
        tints = [kind for kind in free if kind.colour]
        found.append(rng.choice(tints if tints and rng.random() < 0.5 else free))
        names.add(found[-1].name)
    return found


def other_kind(rng: random.Random, vocabulary: Vocabulary, kind: Kind) -> Kind:
    """Kind to take the place of `kind` in a scene that must not have it: its shape in another colour, or another noun.

    It is one of the kinds that the split asks about. Otherwise a kind that training does not know would mean "yes".
    """
    if kind.colour:
        return rng.choice([tint for tint in vocabulary.tints if tint.name == kind.name and tint != kind])
    return rng.choice([noun for noun in vocabulary.nouns if noun != kind])


def same_colour(rng: random.Random, vocabulary: Vocabulary, kind: Kind) -> list[Kind]:
    """Distractors of a coloured shape: one other shape of the same colour, if there is one, else none."""
    others = [tint for tint in vocabulary.all_tints if tint.colour == kind.colour and tint.name != kind.name]
    return [rng.choice(others)] if others else []


def asked_kind(rng: random.Random, vocabulary: Vocabulary) -> Kind:
    """A kind to ask about: half of them nouns, half coloured shapes, if there are both."""
    pools = [pool for pool in (vocabulary.nouns, vocabulary.tints) if pool]
    return rng.choice(rng.choice(pools))


def different_pairs(rng: random.Random, answers: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Random pairs of two different answers, in which each answer comes equally often."""
    shuffled = rng.sample(answers, len(answers))
    if len(shuffled) % 2:
        shuffled *= 2
    return list(zip(shuffled[::2], shuffled[1::2], strict=True))


def described(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """One captioned scene of one to four kinds of objects, among them one that the split asks about."""
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


PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
"""Place of each of the nine cells of the grid in words, by the number of the cell."""


def placed(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """One scene of two to five kinds of objects, with three captions that tell the place of every object."""
    kind = asked_kind(rng, vocabulary)
    scene = place(rng, [kind, *fillers(rng, vocabulary, rng.randint(1, MOST - 1), {kind.name})])

    def listed() -> str:
        return _places_of(rng.sample(scene.objects, len(scene.objects)))

    return [Sample((scene,), (listed(), f"there is {listed()}", f"an image of {listed()}"))]


def _places_of(objects: Sequence[Placed]) -> str:
    """List objects with their places in words, in the given order: "a dog on the left and a cat at the top"."""
    *texts, last = [f"{with_article(one.kind.text)} {PLACES[one.cell]}" for one in objects]
    return f"{', '.join(texts)} and {last}"


def edited(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Two scenes that differ in the kind of one object, and two captions that differ in its words.

    Each has one caption, which tells the place of every object. The metadata `edit` has the edges of the object's cell
    as shares of the image's side: left, top, right and lower one.
    """
    kind = asked_kind(rng, vocabulary)
    other = other_kind(rng, vocabulary, kind)
    scene = place(rng, [kind, *fillers(rng, vocabulary, rng.randint(1, MOST - 1), {kind.name, other.name})])
    order = rng.sample(range(len(scene.objects)), len(scene.objects))
    opening = rng.choice(("", "there is ", "an image of "))
    cell = {"edit": [edge / SIDE for edge in card_box(scene.objects[0].cell)]}
    return [
        Sample((one,), (opening + _places_of([one.objects[number] for number in order]),), cell)
        for one in (scene, scene.with_kind(0, other))
    ]


def one_named(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """One sample of a scene with a single object, of any kind that the split asks about."""
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


def _told(rng: random.Random, vocabulary: Vocabulary) -> tuple[Kind, str, Kind]:
    """Subject, side and anchor of a text such as "the dog is left of the cat", drawn at random."""
    subject = rng.choice(vocabulary.subjects)
    side = rng.choice(vocabulary.sides(subject))
    return subject, side, rng.choice([kind for kind in vocabulary.anchors if kind != subject])


def _side_by_side(rng: random.Random, vocabulary: Vocabulary, subject: Kind, side: str, anchor: Kind) -> Scene:
    one, other, _ = beside(rng, side)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {subject.name, anchor.name})
    return place(rng, [subject, anchor, *others], [one, other])


CORNERS = {
    0: "in the top left corner",
    2: "in the top right corner",
    4: "in the middle",
    6: "in the bottom left corner",
    8: "in the bottom right corner",
}
"""Number of a cell -> its place in words, for the cells in which hypotheses say that an object is."""


def hypotheses_of_a_place(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Three samples of visual entailment, of one text: "a dog is in the middle", or in a corner.

    The image entails the text, contradicts it by another kind in that place, or leaves it open (neutral).
    """
    kind, cell = asked_kind(rng, vocabulary), rng.choice(tuple(CORNERS))
    edit = other_kind(rng, vocabulary, kind)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {kind.name, edit.name})
    scene = place(rng, [kind, *others], [cell])
    text = f"{with_article(kind.text)} is {CORNERS[cell]}"
    return _three_judged(rng, "place", text, scene, scene.with_kind(0, edit), asked=(0,))


def hypotheses_of_a_side(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Three samples of visual entailment, of one text: on which side one object lies of another.

    The image entails the text in the first. In the second the objects have changed places, which contradicts it. In
    the third a card covers one object, so that the answer is open (neutral).
    """
    subject, side, anchor = _told(rng, vocabulary)
    scene = _side_by_side(rng, vocabulary, subject, side, anchor)
    text = f"the {subject.text} is {SIDES[side]} the {anchor.text}"
    return _three_judged(rng, "relation", text, scene, scene.swapped(0, 1), asked=(0, 1))


def hypotheses_of_a_colour(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Three samples of visual entailment, of one text: the colour of the only object of a shape."""
    kind = rng.choice(vocabulary.tints)
    others = fillers(rng, vocabulary, rng.randint(1, 3), {kind.name})
    scene = place(rng, [kind, *others])
    text = f"the {kind.name} is {kind.colour}"
    return _three_judged(rng, "colour", text, scene, scene.with_kind(0, other_kind(rng, vocabulary, kind)), asked=(0,))


def _three_judged(
    rng: random.Random, family: str, text: str, true: Scene, false: Scene, asked: tuple[int, ...]
) -> list[Sample]:
    """Samples of one hypothesis: an image that entails it, one that contradicts it, and one that leaves it open.

    Args:
        family: name that goes into the metadata.
        true, false: scenes in which the text is true or false, without a card.
        asked: numbers of the objects of which the hypothesis speaks. The card covers one of them in the third image.
    """
    beyond = rng.choice([one.cell for number, one in enumerate(true.objects) if number not in asked])
    hidden = true.objects[rng.choice(asked)].cell
    unknown = rng.choice((true, false))  # what is behind the card may be either
    rows = [
        ("entailment", replace(true, card=beyond)),
        ("contradiction", replace(false, card=beyond)),
        ("neutral", replace(unknown, card=hidden)),
    ]
    return [Sample((scene,), (text,), {"label": label, "hypothesis_type": family}) for label, scene in rows]


Pair = tuple[Scene, Scene]


def statements_of_one_side(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Samples of one statement: "only the left image shows a dog", or the right one."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    side = rng.choice(("left", "right"))
    left = [(here, without_too), (here_too, without)]
    right = [(b, a) for a, b in left]
    statement = f"only the {side} image shows {text}"
    return _four_judged(rng, "only", statement, *((left, right) if side == "left" else (right, left)))


def statements_of_both(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Statements that a kind is in both images."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    true, false = [(here, here_too), (here_too, here)], [(here, without_too), (without, here_too)]
    return _four_judged(rng, "both", f"both images show {text}", true, false)


def statements_of_exactly_one(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Statements that a kind is in exactly one image: each image is in a true and in a false pair on each side."""
    (here, without), (here_too, without_too), text = _present(rng, vocabulary)
    true, false = [(here, without_too), (without, here_too)], [(here, here_too), (without, without_too)]
    return _four_judged(rng, "one", f"exactly one of the images shows {text}", true, false)


def statements_of_more(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Samples of one statement: "the left image has more dogs than the right image", or the reverse."""
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
    return _four_judged(rng, "more", statement, *((pairs, exchanged) if side == "left" else (exchanged, pairs)))


def statements_of_a_side(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Samples of one statement: "in both images the dog is left of the cat", or on another side.

    In a false pair of images the two objects are exchanged in one of them.
    """
    subject, side, anchor = _told(rng, vocabulary)
    found: list[Pair] = []
    for _ in range(2):
        scene = _side_by_side(rng, vocabulary, subject, side, anchor)
        found.append((scene, scene.swapped(0, 1)))
    (first, not_first), (second, not_second) = found
    statement = f"in both images the {subject.text} is {SIDES[side]} the {anchor.text}"
    true, false = [(first, second), (second, first)], [(first, not_second), (not_first, second)]
    return _four_judged(rng, "relation", statement, true, false)


def statements_of_a_colour(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Statements that a shape has the same colour in two images."""
    one = rng.choice(vocabulary.tints)
    other = rng.choice([tint for tint in vocabulary.tints if tint.name == one.name and tint != one])
    first, second = (place(rng, [one, *fillers(rng, vocabulary, rng.randint(1, 3), {one.name})]) for _ in range(2))
    not_first, not_second = first.with_kind(0, other), second.with_kind(0, other)
    statement = f"the {plural(one.name)} in the two images have the same colour"
    true, false = [(first, second), (not_first, not_second)], [(first, not_second), (not_first, second)]
    return _four_judged(rng, "same colour", statement, true, false)


def _present(rng: random.Random, vocabulary: Vocabulary) -> tuple[Pair, Pair, str]:
    """Two pairs (scene with a kind of object, the same scene with another kind in its place), and the kind in words."""
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


def _four_judged(rng: random.Random, family: str, statement: str, true: list[Pair], false: list[Pair]) -> list[Sample]:
    rows = [(pair, "true") for pair in true] + [(pair, "false") for pair in false]
    rng.shuffle(rows)
    return [Sample(pair, (statement,), {"images": 2, "label": label, "statement_type": family}) for pair, label in rows]
