"""Texts of composed scenes: true by an independent oracle, balanced for every text, and at chance without the image."""

import re
from collections import Counter, defaultdict
from functools import cache
from itertools import groupby
from typing import Any

import pytest

from mvlm_dataloading.scenes.build import TASKS, compose_split, metadata_of
from mvlm_dataloading.scenes.vocabulary import HELD_COLOURS, NOUNS, SIDES, SPLITS, held_side, is_unseen, vocabulary
from support.scene_oracle import PLAIN, answer, called, entail, judge, on_side

BALANCED = ("vqa", "pairs", "entailment")
SIZES = {"train": 720}
each_split = pytest.mark.parametrize("split", SPLITS)
Row = tuple[str, dict[str, Any]]


@cache
def rows(task: str, split: str) -> list[Row]:
    """First caption and metadata of samples."""
    kinds = vocabulary(split)
    samples = compose_split(task, split, 0, kinds, SIZES.get(split, 240))
    return [(s.captions[0], metadata_of(s, PLAIN, task, split, n, n)) for n, s in enumerate(samples)]


def label(task: str, metadata: dict[str, Any]) -> str:
    return metadata["answers"][0]["answer"] if task in ("vqa", "places") else metadata["label"]


@each_split
def test_answers_are_true(split: str) -> None:
    for question, metadata in rows("vqa", split):
        assert answer(question, metadata["scene"]) == label("vqa", metadata), (question, metadata)
        assert len({tuple(record.values()) for record in metadata["answers"]}) == 10


@pytest.mark.slow
@each_split
def test_statements_are_judged_true(split: str) -> None:
    sets = defaultdict(list)
    for statement, metadata in rows("pairs", split):
        left, right = metadata["scenes"]
        assert str(judge(statement, left, right)).lower() == metadata["label"], (statement, metadata)
        name, number, pair, last = metadata["identifier"].rsplit("-", 3)
        assert (name, int(number), last, metadata["images"]) == (split, metadata["set_id"], "0", 2)
        sets[metadata["set_id"]].append((statement, int(pair)))
    assert all({pair for _, pair in found} == {0, 1, 2, 3} for found in sets.values())
    assert all(len({statement for statement, _ in found}) == 1 for found in sets.values())


@pytest.mark.slow
@each_split
def test_hypotheses_have_their_label(split: str) -> None:
    for hypothesis, metadata in rows("entailment", split):
        assert entail(hypothesis, metadata["scene"]) == metadata["label"], (hypothesis, metadata)


@pytest.mark.slow
@pytest.mark.parametrize("task", BALANCED)
@each_split
def test_every_text_has_each_of_its_labels_equally_often(task: str, split: str) -> None:
    found = defaultdict(Counter)
    for text, metadata in rows(task, split):
        found[text][label(task, metadata)] += 1
    for text, counts in found.items():
        assert len(counts) > 1, (text, counts)
        assert len(set(counts.values())) == 1, (text, counts)


def kinds_of(task: str, split: str) -> set[tuple[str, str | None]]:
    scenes = [s for _, m in rows(task, split) for s in m.get("scenes", [m.get("scene")])]
    return {(one["name"], one["colour"]) for scene in scenes for one in scene["objects"]}


@pytest.mark.slow
def test_unseen_nouns_are_in_split_concept_alone() -> None:
    unseen = {noun for noun in NOUNS if is_unseen(noun)} | {"book"}
    assert 0.15 * len(NOUNS) < len(unseen) < 0.25 * len(NOUNS)
    for split in set(SPLITS) - {"concept"}:
        for task in TASKS:
            assert not {name for name, _ in kinds_of(task, split)} & unseen, split
    for question, _ in rows("vqa", "concept"):
        assert any(re.search(rf"\b{re.escape(noun[:-1])}", question) for noun in unseen), question


@pytest.mark.slow
def test_held_combinations_are_in_split_combo_alone() -> None:
    held = {(shape, colour) for shape, colours in HELD_COLOURS.items() for colour in colours}
    for split in set(SPLITS) - {"combo"}:
        for task in TASKS:
            assert not kinds_of(task, split) & held, split
    trained = kinds_of("vqa", "train")
    for shape, colour in held:
        assert any(name == shape for name, _ in trained)
        assert any(tint == colour for _, tint in trained)
    assert held <= kinds_of("vqa", "combo")


@each_split
def test_places_ask_for_the_objects_of_a_scene_and_what_is_beside_them(split: str) -> None:
    thirds = {"at the top": (1, 0), "on the left": (0, 1), "in the middle": (1, 1), "on the right": (2, 1)}
    thirds |= {"at the bottom": (1, 2)}
    thirds |= {f"at the {down} {across}": (x, y) for y, down in ((0, "top"), (2, "bottom"))
               for x, across in ((0, "left"), (2, "right"))}  # fmt: skip
    often: Counter[str] = Counter()
    for objects, asked in groupby(rows("places", split), lambda row: str(row[1]["scene"]["objects"])):
        questions, scene = [], {}
        for question, metadata in asked:
            scene, given = metadata["scene"], label("places", metadata)
            words = question.removeprefix("what is ").removesuffix("?")
            if words in thirds:
                (found,) = [one for one in scene["objects"] if third(one["box"]) == thirds[words]]
            else:
                told = re.fullmatch(r"(left of|right of|above|below) the (.+)", words)
                assert told, question
                (beside,) = called(scene["objects"], told[2])
                (found,) = [one for one in scene["objects"] if one is not beside and on_side(one, told[1], beside)]
            assert called(scene["objects"], given) == [found], (question, metadata)
            often[metadata["question_type"]] += 1
            questions.append(question)
        assert len(set(questions)) == len(questions), objects
        assert len([q for q in questions if q[8:-1] in thirds]) == len(scene["objects"])
    assert often["place"] > often["relation"] > often["place"] / 3


def third(box: list[int]) -> tuple[int, int]:
    """Column and row of a box's centre in a grid of three by three."""
    x, y, width, height = box
    return int((x + width / 2) // (128 / 3)), int((y + height / 2) // (128 / 3))


def told_sides(split: str) -> set[tuple[str, str]]:
    """(noun, side) of every relation that a text of the split tells or asks for as an answer."""
    sides, found = {words: side for side, words in SIDES.items()}, set()
    pattern = re.compile(rf"(?:the|an?) ([\w -]+?)(?: is)? ({'|'.join(sides)}) (?:the|an?) ")
    for task in TASKS:
        if task == "caption":
            texts = [t for s in compose_split(task, split, 0, vocabulary(split), 300) for t in s.captions]
        else:
            texts = [text for text, _ in rows(task, split)]
        for text in texts:
            found |= {(m[1], sides[m[2]]) for m in pattern.finditer(text) if m[1] in NOUNS}
    for question, metadata in rows("vqa", split) + rows("places", split):
        answered = metadata["answers"][0]["answer"]
        if (match := re.match(rf"what is ({'|'.join(sides)}) ", question)) and answered in NOUNS:
            found.add((answered, sides[match[1]]))
    return found


@pytest.mark.slow
@each_split
def test_a_nouns_held_side_is_told_in_split_combo_alone(split: str) -> None:
    told = told_sides(split)
    assert len(told) > 50
    assert {held_side(noun) == side for noun, side in told} == {split == "combo"}


@pytest.mark.slow
def test_splits_share_no_scene() -> None:
    for task in TASKS:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for _, metadata in rows(task, split):
                for scene in metadata.get("scenes", [metadata.get("scene")]):
                    boxes = str([(one["name"], one["colour"], one["box"]) for one in scene["objects"]])
                    if len(scene["objects"]) > 2:  # a single object may well be at the same place twice
                        assert seen.setdefault(boxes, split) == split
