"""Facts that a caption states about a scene, and facts of the scene itself: captions are judged by them, not by words.

A fact is ("object", name), ("colour", name, colour), ("count", text, number) or ("relation", text, side, text), where a
text is a noun or a shape with or without its colour.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .vocabulary import COLOURS, NOUNS, NUMBERS, SHAPES, SIDES, plural

Fact = tuple[Any, ...]
Objects = Sequence[Mapping[str, Any]]

_SINGULAR = {name: name for name in (*NOUNS, *SHAPES)}
_NAME_OF = {plural(name): name for name in _SINGULAR} | _SINGULAR
_COUNTS = {"a": 1, "an": 1} | {word: number for number, word in enumerate(NUMBERS)}
_SIDE_OF = {words: side for side, words in SIDES.items()}


def _any_of(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_THING = re.compile(
    rf"\b(?:({_any_of(list(_COUNTS))}|the) )?(?:({_any_of(COLOURS)}) )?({_any_of(list(_NAME_OF))})(?![\w-])"
)
_BETWEEN = re.compile(rf"(?: is| are)? ({_any_of(list(_SIDE_OF))}) ")


def stated_facts(caption: str) -> set[Fact]:
    """Facts that a scene's caption states: counts, objects, colours, and on which side of another an object lies.

    Words that say none of these are passed over.
    """
    text = " ".join(re.sub(r"[^\w\s-]", " , ", caption.lower()).split())
    found: set[Fact] = set()
    before: re.Match[str] | None = None
    for match in _THING.finditer(text):
        number, colour, noun = match.groups()
        kind, count = _kind(match), _COUNTS.get(number)
        if count is not None:
            found.add(("count", kind, count))
        if count != 0:
            found.add(("object", _NAME_OF[noun]))
            if colour:
                found.add(("colour", _NAME_OF[noun], colour))
        if before is not None and (side := _BETWEEN.fullmatch(text[before.end() : match.start()])):
            found.add(("relation", _kind(before), _SIDE_OF[side[1]], kind))
        before = match
    return found


def _kind(match: re.Match[str]) -> str:
    _, colour, noun = match.groups()
    return f"{colour} {_NAME_OF[noun]}" if colour else _NAME_OF[noun]


def scene_facts(objects: Objects) -> set[Fact]:
    """Facts that a complete caption of a scene states: every object, its colour, and the number of each kind.

    Args:
        objects: records {name, colour, box} of the scene; colour is None for an object without one.
    """
    counts = Counter((one["name"], one["colour"]) for one in objects)
    found: set[Fact] = set()
    for (name, colour), number in counts.items():
        found |= {("object", name), ("count", f"{colour} {name}" if colour else name, number)}
        if colour:
            found.add(("colour", name, colour))
    return found


def is_true(fact: Fact, scene: Mapping[str, Any]) -> bool:
    """True if a fact holds in a scene {size, objects}. A relation holds if any two objects of its two texts stand so.

    An object is left of another if its centre is further left by more than a quarter of the image's width.
    """
    objects: Objects = scene["objects"]
    match fact:
        case "object", name:
            return any(one["name"] == name for one in objects)
        case "colour", name, colour:
            return any((one["name"], one["colour"]) == (name, colour) for one in objects)
        case "count", text, number:
            return len(_named(objects, text)) == number
        case "relation", text, side, other:
            pairs = [(a, b) for a in _named(objects, text) for b in _named(objects, other) if a is not b]
            return any(_is_beside(a["box"], side, b["box"], scene["size"]) for a, b in pairs)
    raise ValueError(f"wanted a fact, got {fact}")


def _named(objects: Objects, text: str) -> Objects:
    """Objects to which a text refers: a noun, a shape of any colour, or a shape with its colour."""
    return [one for one in objects if text in (one["name"], f"{one['colour']} {one['name']}")]


def _is_beside(box: Sequence[float], side: str, other: Sequence[float], size: Sequence[float]) -> bool:
    axis = 0 if side in ("left", "right") else 1
    ahead = other[axis] + other[axis + 2] / 2 - box[axis] - box[axis + 2] / 2
    return (ahead if side in ("left", "above") else -ahead) > size[axis] / 4
