"""Answers to the texts of composed scenes, read off the metadata by rules of their own: loops over boxes and names."""

import re
from typing import Any

from mvlm_dataloading.scenes.drawing import Artwork
from mvlm_dataloading.scenes.vocabulary import NOUNS, SHAPES, TINTS, plural

TEXTS = [*NOUNS, *(tint.text for tint in TINTS)]
ONE_OF = {plural(text): text for text in (*TEXTS, *SHAPES)}
PLAIN = Artwork("licence", "someone", {t: t for t in TEXTS}, dict.fromkeys(TEXTS, b""), dict.fromkeys(TEXTS, (80, 60)))
"""Artwork without images, all of one shape."""

Object = dict[str, Any]


def seen(scene: dict[str, Any]) -> list[Object]:
    return [one for one in scene["objects"] if not one.get("hidden")]


def called(objects: list[Object], text: str) -> list[Object]:
    """Objects that a text names: "heart" names hearts of all colours."""
    return [one for one in objects if text == one["name"] or text == f"{one['colour']} {one['name']}"]


def on_side(one: Object, side: str, other: Object) -> bool:
    """More than 32 pixels, a quarter of the image, between the centres in the direction of the side."""
    (x, y, w, h), (u, v, p, q) = one["box"], other["box"]
    right, down = x + w / 2 - u - p / 2, y + h / 2 - v - q / 2
    return {"left of": -right, "right of": right, "above": -down, "below": down}[side] > 32


def answer(question: str, scene: dict[str, Any]) -> str:
    """The answer to a question about a scene. Fails where the question has no single answer."""
    objects = scene["objects"]
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if called(objects, found[1]) else "no"
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(called(objects, ONE_OF[found[1]])))
    if found := re.fullmatch(r"what colour is the (.+)\?", question):
        (one,) = called(objects, found[1])
        return one["colour"]
    if found := re.fullmatch(r"are there more (.+) than (.+)\?", question):
        first, second = (len(called(objects, ONE_OF[text])) for text in found.groups())
        return "yes" if first > second else "no"
    if found := re.fullmatch(r"is the (.+) the same colour as the (.+)\?", question):
        (one,), (other,) = (called(objects, text) for text in found.groups())
        return "yes" if one["colour"] == other["colour"] else "no"
    found = re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question)
    assert found, question
    (anchor,) = called(objects, found[2])
    (one,) = [one for one in objects if on_side(one, found[1], anchor)]
    return one["name"]


def judge(statement: str, left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Truth of a statement about two scenes."""
    images = {"left": left["objects"], "right": right["objects"]}

    def shows(side: str, text: str) -> bool:
        return bool(called(images[side], re.sub("^an? ", "", text)))

    if found := re.fullmatch(r"only the (left|right) image shows (.+)", statement):
        return [side for side in images if shows(side, found[2])] == [found[1]]
    if found := re.fullmatch(r"both images show (.+)", statement):
        return shows("left", found[1]) and shows("right", found[1])
    if found := re.fullmatch(r"exactly one of the images shows (.+)", statement):
        return shows("left", found[1]) != shows("right", found[1])
    if found := re.fullmatch(r"the (left|right) image has more (.+) than the (left|right) image", statement):
        assert found[1] != found[3]
        return len(called(images[found[1]], ONE_OF[found[2]])) > len(called(images[found[3]], ONE_OF[found[2]]))
    if found := re.fullmatch(r"the (.+) in the two images have the same colour", statement):
        (one,), (other,) = (called(objects, ONE_OF[found[1]]) for objects in images.values())
        return one["colour"] == other["colour"]
    found = re.fullmatch(r"in both images the (.+) is (left of|right of|above|below) the (.+)", statement)
    assert found, statement
    pairs = [(called(objects, found[1]), called(objects, found[3])) for objects in images.values()]
    return all(on_side(one, found[2], other) for (one,), (other,) in pairs)


def entail(hypothesis: str, scene: dict[str, Any]) -> str:
    """Label of a hypothesis: neutral if what it speaks of is not to be seen."""
    objects = seen(scene)
    (card,) = [one for one in scene["objects"] if one.get("hidden")]
    if found := re.fullmatch(r"an? (.+) is in the (.+)", hypothesis):
        middles = {"top left corner": (21, 21), "top right corner": (107, 21), "middle": (64, 64)}
        middles |= {"bottom left corner": (21, 107), "bottom right corner": (107, 107)}
        u, v = middles[found[2]]

        def is_there(one: Object) -> bool:
            x, y, w, h = one["box"]
            return abs(x + w / 2 - u) < 21 and abs(y + h / 2 - v) < 21

        if is_there(card):
            return "neutral"
        (one,) = [one for one in objects if is_there(one)]
        return "entailment" if called([one], found[1]) else "contradiction"
    if found := re.fullmatch(r"the (.+) is (left of|right of|above|below) the (.+)", hypothesis):
        one, other = called(objects, found[1]), called(objects, found[3])
        if not one or not other:
            return "neutral"
        (one,), (other,) = one, other
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[found[2]]
        assert on_side(one, found[2], other) != on_side(one, opposite, other)
        return "entailment" if on_side(one, found[2], other) else "contradiction"
    found = re.fullmatch(r"the (.+) is (\w+)", hypothesis)
    assert found, hypothesis
    one = called(objects, found[1])
    if not one:
        return "neutral"
    (one,) = one
    return "entailment" if one["colour"] == found[2] else "contradiction"
