"""Samples of a task before they are drawn, and what all tasks need to compose them."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .kinds import Kind
from .layout import Scene
from .vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Sample:
    """One question: its images, its texts, and its metadata."""

    scenes: tuple[Scene, ...]
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


Family = Callable[[random.Random, Vocabulary], list[Sample]]
"""Makes a block of samples in which every text has each of its answers equally often."""


def compose(families: Mapping[str, Family], seed: str, vocabulary: Vocabulary, count: int) -> list[Sample]:
    """At least `count` samples in whole blocks, evenly of all families."""
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
    """Kinds of other names, each name at most once: half of them coloured shapes, if there are any."""
    names, found = set(without), []
    for _ in range(count):
        free = [kind for kind in vocabulary.fill if kind.name not in names]
        tints = [kind for kind in free if kind.colour]
        found.append(rng.choice(tints if tints and rng.random() < 0.5 else free))
        names.add(found[-1].name)
    return found


def other_kind(rng: random.Random, vocabulary: Vocabulary, kind: Kind) -> Kind:
    """Substitute of a kind where it is missing: the same shape in another colour, or another noun.

    It is one of the kinds that the split asks about. Otherwise a kind that training does not know would mean "yes".
    """
    if kind.colour:
        return rng.choice([tint for tint in vocabulary.tints if tint.name == kind.name and tint != kind])
    return rng.choice([noun for noun in vocabulary.nouns if noun != kind])


def same_colour(rng: random.Random, vocabulary: Vocabulary, kind: Kind) -> list[Kind]:
    """Another shape of the same colour, if there is one: a distractor."""
    others = [tint for tint in vocabulary.all_tints if tint.colour == kind.colour and tint.name != kind.name]
    return [rng.choice(others)] if others else []


def asked_kind(rng: random.Random, vocabulary: Vocabulary) -> Kind:
    """A kind to ask about: half of them nouns, half coloured shapes, if there are both."""
    pools = [pool for pool in (vocabulary.nouns, vocabulary.tints) if pool]
    return rng.choice(rng.choice(pools))


def different_pairs(rng: random.Random, answers: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pairs of different answers in which each answer is equally often."""
    shuffled = rng.sample(answers, len(answers))
    if len(shuffled) % 2:
        shuffled *= 2
    return list(zip(shuffled[::2], shuffled[1::2], strict=True))
