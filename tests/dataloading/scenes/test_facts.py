"""Facts of captions and of scenes, and the captions that scenes get."""

import re

import pytest

from mvlm_dataloading.scenes.build import compose_split, metadata_of
from mvlm_dataloading.scenes.facts import is_true, scene_facts, stated_facts
from mvlm_dataloading.scenes.vocabulary import SPLITS, vocabulary
from support.scene_oracle import PLAIN

SCENE = {
    "size": [128, 128],
    "objects": [
        {"name": "dog", "colour": None, "box": [0, 0, 40, 40]},
        {"name": "heart", "colour": "red", "box": [80, 0, 40, 40]},
        {"name": "heart", "colour": "red", "box": [80, 80, 40, 40]},
    ],
}
FACTS = [
    ("a dog", {("object", "dog"), ("count", "dog", 1)}),
    ("The Dog!", {("object", "dog")}),
    ("dogs", {("object", "dog")}),
    ("a hot dog and doghouses", {("object", "dog")}),  # words between an article and a noun are not understood
    ("no dog", {("count", "dog", 0)}),
    ("two red hearts", {("object", "heart"), ("colour", "heart", "red"), ("count", "red heart", 2)}),
    ("three geese", {("object", "goose"), ("count", "goose", 3)}),
    ("a t-shirt", {("object", "t-shirt"), ("count", "t-shirt", 1)}),
    ("an evergreen tree", {("object", "evergreen tree"), ("count", "evergreen tree", 1)}),
    ("the dog is left of the cat", {("object", "dog"), ("object", "cat"), ("relation", "dog", "left", "cat")}),
    (
        "a dog above a red heart",
        {("object", "dog"), ("count", "dog", 1), ("object", "heart"), ("colour", "heart", "red"),
         ("count", "red heart", 1), ("relation", "dog", "above", "red heart")},
    ),
    ("the dog. below the cat", {("object", "dog"), ("object", "cat")}),
    ("nothing to see", set()),
]  # fmt: skip


@pytest.mark.parametrize("caption, facts", FACTS)
def test_captions_state_facts(caption: str, facts: set) -> None:
    assert stated_facts(caption) == facts


TRUE = [
    ("object", "dog"), ("colour", "heart", "red"), ("count", "heart", 2), ("count", "red heart", 2),
    ("count", "cat", 0), ("relation", "dog", "left", "heart"), ("relation", "red heart", "below", "dog"),
    ("relation", "heart", "above", "heart"),
]  # fmt: skip
FALSE = [
    ("object", "cat"), ("colour", "heart", "blue"), ("count", "dog", 2), ("count", "blue heart", 2),
    ("relation", "dog", "right", "heart"), ("relation", "dog", "below", "heart"), ("relation", "dog", "above", "dog"),
]  # fmt: skip


def test_facts_are_true_or_false_of_a_scene() -> None:
    assert [is_true(fact, SCENE) for fact in TRUE] == [True] * len(TRUE)
    assert [is_true(fact, SCENE) for fact in FALSE] == [False] * len(FALSE)
    with pytest.raises(ValueError, match="wanted a fact"):
        is_true(("size", "dog", 3), SCENE)


def test_a_side_needs_more_than_a_quarter_of_the_image() -> None:
    for distance, holds in ((32, False), (33, True)):
        boxes = [
            {"name": "dog", "colour": None, "box": [0, 9, 8, 4]},
            {"name": "cat", "colour": None, "box": [distance, 0, 8, 9]},
        ]
        scene = {"size": [128, 128], "objects": boxes}
        assert is_true(("relation", "dog", "left", "cat"), scene) == holds
        assert is_true(("relation", "cat", "right", "dog"), scene) == holds


@pytest.mark.parametrize("split", ["train", "concept"])
def test_captions_tell_the_place_of_every_object_and_no_other(split: str) -> None:
    """Each part of a caption is an object's noun and the third of the image, both ways, that its centre lies in."""
    rows, columns = {0: "top", 1: "", 2: "bottom"}, {0: "left", 1: "", 2: "right"}
    for number, sample in enumerate(compose_split("placed", split, 0, vocabulary(split), 100)):
        scene, wanted = metadata_of(sample, PLAIN, "placed", split, number, number)["scene"], set()
        for one in scene["objects"]:
            x, y, width, height = one["box"]
            third = [int(3 * (edge + side / 2) / 128) for edge, side in ((x, width), (y, height))]
            words = {rows[third[1]], columns[third[0]]} - {""} or {"middle"}
            wanted.add((f"{one['colour'] or ''} {one['name']}".strip(), frozenset(words)))
        assert len(sample.captions) == 3
        for caption in sample.captions:
            caption = caption.removeprefix("there is ").removeprefix("an image of ")
            told = [re.fullmatch(r"an? (.*) (?:at the|on the|in the) (.*)", x) for x in re.split(", | and ", caption)]
            assert all(told), caption
            assert {(x[1], frozenset(x[2].split())) for x in told if x} == wanted, caption


def test_edits_change_one_object_of_the_scene_and_its_words_in_the_caption() -> None:
    samples = compose_split("placed", "edits", 0, vocabulary("test"), 200)
    changed = set()
    for number in range(0, len(samples), 2):
        one, other = (metadata_of(s, PLAIN, "placed", "edits", number, number) for s in samples[number : number + 2])
        kinds, others = ([(o["colour"], o["name"]) for o in m["scene"]["objects"]] for m in (one, other))
        assert kinds[1:] == others[1:]
        assert len({*kinds, others[0]}) == len(kinds) + 1  # the new kind is none of the scene's
        parts, rest = ([*re.split(", | and ", s.captions[0])] for s in samples[number : number + 2])
        pairs = [(a, b) for a, b in zip(parts, rest, strict=True) if a != b]
        assert len(pairs) == 1
        for part, kind in zip(pairs[0], (kinds[0], others[0]), strict=True):
            assert " ".join(filter(None, kind)) in part
        changed.add(parts.index(pairs[0][0]))
    assert changed >= {0, 1, 2}  # it stands anywhere in the caption


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_captions_of_scenes_state_true_facts_and_all_of_them(split: str) -> None:
    samples = compose_split("caption", split, 0, vocabulary(split), 200)
    told = 0
    for number, sample in enumerate(samples):
        scene = metadata_of(sample, PLAIN, "caption", split, number, number)["scene"]
        assert 3 <= len(sample.captions) <= 5
        for place, caption in enumerate(sample.captions):
            facts = stated_facts(caption)
            assert all(is_true(fact, scene) for fact in facts), (caption, scene)
            relations = [fact for fact in facts if fact[0] == "relation"]
            assert bool(relations) == (place > 2), caption
            told += len(relations)
            if place != 3:
                assert scene_facts(scene["objects"]) <= facts, caption
    assert told > 100
