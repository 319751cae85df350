"""Intervals over images: a sample whose `image_id` is empty is an image of its own, as one without the field."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvlm.tasks.entailment import Entailment
from mvlm.tasks.grounding import phrases_of
from mvlm.tasks.score import score
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm_dataloading import Dataset, ShardWriter, open_dataset
from support.scenes import png, scene

SAMPLES = 12
ANSWERS = [{"answer": "red", "answer_id": k} for k in range(10)]
GIVEN: list[dict[str, Any]] = [{"image_id": None}, {"image_id": ""}, {}]


def write(folder: Path, metadata: list[dict[str, Any]]) -> Dataset:
    with ShardWriter(folder, name="x", source="", licence="", attribution="", recipe={}) as writer:
        for i, record in enumerate(metadata):
            assert writer.add(f"{i:02}", png(scene(i)[0]), [f"number {i}"], record, split="test") is None
    return open_dataset(folder, "test")


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("given", GIVEN)
def test_answers_and_labels_of_empty_image_ids_have_intervals_with_a_width(tmp_path, given):
    """A third is right: the interval is that of a binomial. One image alone would have one without a width."""
    asked = [{"question_id": i, "answers": ANSWERS, "label": "neutral", **given} for i in range(SAMPLES)]
    dataset = write(tmp_path / "data", asked)
    answers = [{"answer": "red" if i % 3 == 0 else "blue"} for i in range(SAMPLES)]
    labels = [{"label": "neutral" if i % 3 == 0 else "entailment"} for i in range(SAMPLES)]
    found = [VisualQuestionAnswering.score(answers, dataset), Entailment.score(labels, dataset)]
    assert [figures["accuracy_95"] for figures in found] == [pytest.approx([100 / 12, 700 / 12])] * 2


@pytest.mark.parametrize("given", GIVEN)
def test_files_of_empty_image_ids_have_intervals_with_a_width(tmp_path, given):
    right = [i % 3 == 0 for i in range(SAMPLES)]
    answers = [{"question_id": i, "answer": "red" if good else "blue"} for i, good in enumerate(right)]
    (tmp_path / "answers").write_text(json.dumps(answers))
    asked = [{"question_id": i, "answers": ANSWERS, **given} for i in range(SAMPLES)]
    (tmp_path / "questions").write_text(json.dumps({"annotations": asked}))
    labels = [{"pairID": i, "label": "neutral" if good else "entailment"} for i, good in enumerate(right)]
    release = {"Flickr30K_ID": given["image_id"]} if given else {}
    pairs = [{"pairID": i, "gold_label": "neutral", **release} for i in range(SAMPLES)]
    points = [{"id": i, "x": 5 if good else 50, "y": 5} for i, good in enumerate(right)]
    boxes = [{"id": i, "box": [0, 0, 10, 10], "size": [100, 100], **given} for i in range(SAMPLES)]
    found = [
        score("vqa", tmp_path / "answers", tmp_path / "questions"),
        score("entailment", lines(tmp_path / "labels", labels), lines(tmp_path / "pairs", pairs)),
        score("grounding", lines(tmp_path / "points", points), lines(tmp_path / "boxes", boxes)),
    ]
    assert [figures["accuracy_95"] for figures in found] == [pytest.approx([100 / 12, 700 / 12])] * 3


@pytest.mark.parametrize("given", GIVEN)
def test_phrases_of_empty_image_ids_have_images_of_their_own(tmp_path, given):
    known = {"box": [0, 0, 16, 16], "size": [32, 32], **given}
    assert len(set(phrases_of(write(tmp_path / "data", [known] * SAMPLES)).images)) == SAMPLES
