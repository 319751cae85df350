"""Questions about scenes: in pairs of scenes that differ in one object, and about what is where.

Every family of pairs makes blocks in which each question has each of its answers equally often. A guess from the text
alone is therefore right at chance in every split, for every question by itself. The training split gets further
questions, because few others name a given noun.

Questions about what is on a place of the image, or on a side of another object, teach which word belongs to which
patch. The answers of such a text are not balanced.
"""

import random

from .layout import MOST, Scene, beside, is_beside, place
from .texts import PLACES, Family, Sample, asked_kind, compose, different_pairs, fillers, other_kind, same_colour
from .vocabulary import SIDES, Kind, Vocabulary, plural, with_article

ANSWERS = 8
"""Possible answers of a question such as "what is left of the dog?"."""


def with_presence(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    """The given questions, each followed by questions such as "is there a dog?" about its scene.

    Given questions come in pairs of scenes. A kind is asked about if it is in one scene of the pair and not in the
    other, so each question has both answers equally often. Among 8,000 questions, a noun is asked about 4 times (the
    median), with the further ones 34 times.
    """
    found = []
    for pair in zip(samples[::2], samples[1::2], strict=True):
        here, there = ({one.kind for one in sample.scenes[0].objects} for sample in pair)
        apart = [kind for kind in vocabulary.asked if (kind in here) != (kind in there)]
        for sample, kinds in zip(pair, (here, there), strict=True):
            found.append(sample)
            for kind in apart:
                question = _presence(kind)
                if question not in sample.captions:
                    found.append(asked("exist", question, "yes" if kind in kinds else "no", sample.scenes[0]))
    return found


def exist(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Two questions "is there a ...?" on a noun or a coloured shape. One scene has it, one has another instead."""
    kind = asked_kind(rng, vocabulary)
    edit = other_kind(rng, vocabulary, kind)
    others = same_colour(rng, vocabulary, kind) if kind.colour else []
    names = {kind.name, edit.name, *(other.name for other in others)}
    others += fillers(rng, vocabulary, rng.randint(1, 3), names)
    scene = place(rng, [kind, *others])
    question = _presence(kind)
    return [
        asked("exist", question, "yes", scene),
        asked("exist", question, "no", scene.with_kind(0, edit)),
    ]


def number(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Six questions "how many ...?" about a noun or a shape, whose answers are 0 to 5, each once.

    A shape is counted in any colour or in one.
    """
    kind = asked_kind(rng, vocabulary)
    any_colour = kind.colour is not None and rng.random() < 0.5
    text = kind.name if any_colour else kind.text
    samples = []
    for fewer in (0, 2, 4):
        counted = [kind] * (fewer + 1)
        if any_colour:
            counted = [rng.choice([t for t in vocabulary.all_tints if t.name == kind.name]) for _ in counted]
            counted[0] = kind
        edit = fillers(rng, vocabulary, 1, {kind.name})[0] if any_colour else other_kind(rng, vocabulary, kind)
        near = [edit] if kind.colour and not any_colour else []
        room = MOST - len(counted)
        others = [*near, *fillers(rng, vocabulary, rng.randint(0, 2), {kind.name, edit.name})][:room]
        scene = place(rng, [*counted, *others])
        question = f"how many {plural(text)} are there?"
        samples.append(asked("count", question, str(fewer + 1), scene))
        samples.append(asked("count", question, str(fewer), scene.with_kind(0, edit)))
    return samples


def colour(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Questions on the colour of the only object of a shape in its scene. Each colour is the answer equally often."""
    shape = rng.choice(sorted({tint.name for tint in vocabulary.tints}))
    colours = [tint for tint in vocabulary.tints if tint.name == shape]
    samples = []
    for one, other in different_pairs(rng, colours):
        shapes = [t for t in vocabulary.all_tints if t.name != shape]
        others = [rng.choice(shapes)]
        others += fillers(rng, vocabulary, rng.randint(0, 3), {shape, others[0].name})
        scene = place(rng, [one, *others])
        question = f"what colour is the {shape}?"
        samples.append(asked("colour", question, one.colour, scene))
        samples.append(asked("colour", question, other.colour, scene.with_kind(0, other)))
    return samples


def relation(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Questions "what is left of the dog?", or on another side, where exactly one noun stands. Each has eight answers.

    The answers of a question are the same in all splits of one vocabulary. One more of the eight is in the scene, but
    not on that side: to name an answer that is there is right half of the time.
    """
    anchor, side = rng.choice(vocabulary.anchors), rng.choice(tuple(SIDES))
    candidates = [kind for kind in vocabulary.subjects if kind != anchor and vocabulary.stands(kind.name, side)]
    choice = random.Random(f"answers {anchor.text} {side}")
    answers = choice.sample(candidates, min(ANSWERS, len(candidates)))
    samples = []
    for one, other in different_pairs(rng, answers):
        subject_cell, anchor_cell, free = beside(rng, side)
        distractor = rng.choice([kind for kind in answers if kind not in (one, other)])
        names = {anchor.name, *(kind.name for kind in answers)}
        others = [distractor, *fillers(rng, vocabulary, min(len(free), rng.randint(1, 3)) - 1, names)]
        cells = [subject_cell, anchor_cell, *rng.sample(free, len(others))]
        scene = place(rng, [one, anchor, *others], cells)
        question = f"what is {SIDES[side]} the {anchor.text}?"
        samples.append(asked("relation", question, one.text, scene))
        samples.append(asked("relation", question, other.text, scene.with_kind(0, other)))
    return samples


def compare(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Two questions "are there more A than B?". One scene has one A more than B; in the other one A became a B."""
    first = asked_kind(rng, vocabulary)
    pool = vocabulary.all_tints if first.colour else vocabulary.nouns
    second = rng.choice([kind for kind in pool if kind.name != first.name])
    fewer = rng.choice((1, 1, 2))
    others = fillers(rng, vocabulary, rng.randint(0, MOST - 2 * fewer - 1), {first.name, second.name})
    scene = place(rng, [first] * (fewer + 1) + [second] * fewer + others)
    one, other = (first.text, second.text) if rng.random() < 0.5 or not first.colour else (first.name, second.name)
    question = f"are there more {plural(one)} than {plural(other)}?"
    return [
        asked("compare", question, "yes", scene),
        asked("compare", question, "no", scene.with_kind(0, second)),
    ]


def is_same_colour(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Two questions whether two shapes have the same colour, one of each answer."""
    pairs = [
        (one, other)
        for one in vocabulary.tints
        for other in vocabulary.all_tints
        if one.colour == other.colour and one.name != other.name
    ]
    one, other = rng.choice(pairs)
    edits = [tint for tint in vocabulary.tints if tint.name == one.name and tint != one]
    others = fillers(rng, vocabulary, rng.randint(0, 3), {one.name, other.name})
    scene = place(rng, [one, other, *others])
    question = f"is the {one.name} the same colour as the {other.name}?"
    return [
        asked("same colour", question, "yes", scene),
        asked("same colour", question, "no", scene.with_kind(0, rng.choice(edits))),
    ]


FAMILIES: dict[str, Family] = {
    "exist": exist, "count": number, "relation": relation, "compare": compare, "colour": colour,
    "same colour": is_same_colour,
}  # fmt: skip


def make_training_questions(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Questions of all families for training, with further ones of `with_presence`, and about as many on sides alone.

    The answer to a question on a side is one of 144 nouns. Among 8,000 questions a noun is the answer to 9 on average,
    with the further ones to 65.
    """
    samples = with_presence(compose(FAMILIES, seed, vocabulary, count), vocabulary)
    return samples + compose({"relation": relation}, f"{seed} further", vocabulary, count)


def _presence(kind: Kind) -> str:
    return f"is there {with_article(kind.text)}?"


def asked(family: str, question: str, answer: str | None, scene: Scene) -> Sample:
    """A question of a `family` about a scene, with the answer of ten annotators who agree, as in VQA v2."""
    assert answer is not None
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    metadata = {
        "question_type": family,
        "answer_type": answer_type,
        "answers": [{"answer": answer, "answer_id": annotator} for annotator in range(1, 11)],
    }
    return Sample((scene,), (question,), metadata)


MOST_RELATIONS = 3
"""Most questions of a scene about sides."""


def make_training_places(seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """Make questions on what is where, about `count` scenes (`what_is_where`)."""
    scenes = (what_is_where(random.Random(f"{seed} scene {number}"), vocabulary) for number in range(count))
    return [sample for questions in scenes for sample in questions]


def what_is_where(rng: random.Random, vocabulary: Vocabulary) -> list[Sample]:
    """Questions about one scene of two to five kinds: on the place of each object, and up to three on neighbours."""
    first = asked_kind(rng, vocabulary)
    scene = place(rng, [first, *fillers(rng, vocabulary, rng.choice((1, 2, 3, 3, 4)), {first.name})])
    sides = _relations(vocabulary, scene)
    return [asked("place", f"what is {PLACES[one.cell]}?", one.kind.text, scene) for one in scene.objects] + rng.sample(
        sides, min(len(sides), MOST_RELATIONS)
    )


def _relations(vocabulary: Vocabulary, scene: Scene) -> list[Sample]:
    """Questions "what is left of the dog?", for each object of a scene and each side on which it has one neighbour."""
    found = []
    for anchor in scene.objects:
        for side, words in SIDES.items():
            there = [one.kind for one in scene.objects if is_beside(one, side, anchor)]
            if len(there) == 1 and (there[0].colour or vocabulary.stands(there[0].name, side)):
                found.append(asked("relation", f"what is {words} the {anchor.kind.text}?", there[0].text, scene))
    return found
