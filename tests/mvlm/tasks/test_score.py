"""Prediction files in published formats: scored, written, and what is wrong with files."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvlm.errors import ConfigError, RunError
from mvlm.tasks.score import WRITTEN, are_predictions, read_json_lines, score, write_predictions

ANSWERS = [{"answer": "cat", "answer_id": a} for a in range(10)]
EMPTY_IDS: list[dict[str, Any]] = [{"image_id": None}, {"image_id": ""}, {}]


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def vqa_files(tmp_path):
    """Six questions about three images, of which the first three are answered right."""
    annotations = [
        {"question_id": 10 + i, "image_id": i // 2, "question_type": None if i else "what", "answers": ANSWERS}
        for i in range(6)
    ]
    answers = [{"question_id": 10 + i, "answer": "cat" if i < 3 else "dog"} for i in range(6)]
    return write_json(tmp_path / "answers.json", answers), write_json(
        tmp_path / "val.json", {"annotations": annotations}
    )


def test_vqa_answers_and_their_difference_to_another_models(vqa_files, tmp_path):
    answers, references = vqa_files
    found = score("vqa", answers, references)
    assert (found["accuracy"], found["examples"]) == (50, 6)
    assert found["accuracy_95"] == [0, 100]  # three images: right, half right, wrong
    assert found["by_question_type"] == {"all": 40, "what": 100}  # one without a type counts among all
    better = [record | {"answer": "cat"} for record in json.loads(answers.read_text())]
    compared = score("vqa", write_json(tmp_path / "better.json", better), references, other=answers)["compared"]
    assert (compared["other"], compared["difference"]) == (50, 50)
    assert compared["mcnemar_p"] == pytest.approx(0.25)  # 3 : 0


@pytest.mark.parametrize("name", ["Flickr30K_ID", "Flickr30kID", "Flikr30kID"])
def test_entailment_with_intervals_over_images_in_every_release(tmp_path, name):
    lines = [{"pairID": f"{i}", "gold_label": "neutral", name: f"{i % 2}.jpg"} for i in range(40)]
    given = [{"pairID": f"{i}", "label": "neutral" if i % 2 else "entailment"} for i in range(40)]
    found = score("entailment", write_lines(tmp_path / "p", given), write_lines(tmp_path / "r", lines))
    assert (found["accuracy"], found["accuracy_95"]) == (50, [0, 100])  # two images: one all right, one all wrong
    assert found["recall"] == {"contradiction": None, "neutral": 50, "entailment": None}


def test_pairs_with_intervals_over_sets_of_images(tmp_path):
    """Four pairs of one set are judged alike, so with two sets the interval is as wide as it can be."""
    names = [f"dev-{images}-{pair}-0" for images in range(2) for pair in range(4)]
    rows = "".join(f"{name},{'True' if name.startswith('dev-0') else 'false'}\n" for name in names)
    (tmp_path / "p.csv").write_text(rows)
    wanted = write_lines(tmp_path / "r.jsonl", [{"identifier": name, "label": "True"} for name in names])
    found = score("pairs", tmp_path / "p.csv", wanted)
    assert (found["accuracy"], found["consistency"], found["accuracy_95"]) == (50, 50, [0, 100])


def test_captions_and_the_facts_that_they_state_about_scenes(tmp_path):
    scene = {"size": [128, 128], "objects": [{"name": "dog", "colour": None, "box": [0, 0, 40, 40]}]}
    results = write_json(tmp_path / "r.json", [{"image_id": i, "caption": "a dog on the grass"} for i in (1, 2)])
    texts = [(1, "a dog on the grass"), (1, "one dog"), (2, "a dog on the grass"), (2, "number 2")]
    annotations = [{"image_id": i, "caption": text} for i, text in texts]
    document = {"images": [{"id": i, "scene": scene} for i in (1, 2)], "annotations": annotations}
    found = score("caption", results, write_json(tmp_path / "a.json", document))
    assert (found["bleu_4"], found["fact_precision"], found["fact_recall"]) == (pytest.approx(100), 100, 100)
    kitchens = {"images": [{"id": i, "scene": "kitchen"} for i in (1, 2)], "annotations": annotations}
    assert "fact_f1" not in score("caption", results, write_json(tmp_path / "k.json", kitchens))
    document["images"].pop()
    with pytest.raises(RunError, match="scene"):
        score("caption", results, write_json(tmp_path / "b.json", document))


@pytest.mark.parametrize("given", EMPTY_IDS)
def test_a_sample_whose_image_id_is_empty_is_an_image_of_its_own(tmp_path, given):
    """A third is right: the interval is that of a binomial. One image alone would have one without a width."""
    right = [i % 3 == 0 for i in range(12)]
    answers = [{"question_id": i, "answer": "cat" if good else "dog"} for i, good in enumerate(right)]
    asked = [{"question_id": i, "answers": ANSWERS, **given} for i in range(12)]
    labels = [{"pairID": i, "label": "neutral" if good else "entailment"} for i, good in enumerate(right)]
    release = {"Flickr30K_ID": given["image_id"]} if given else {}
    pairs = [{"pairID": i, "gold_label": "neutral", **release} for i in range(12)]
    found = [
        score("vqa", write_json(tmp_path / "a", answers), write_json(tmp_path / "q", {"annotations": asked})),
        score("entailment", write_lines(tmp_path / "l", labels), write_lines(tmp_path / "p", pairs)),
    ]
    assert [figures["accuracy_95"] for figures in found] == [pytest.approx([100 / 12, 700 / 12])] * 2


VQA = [{"question_id": 1, "answer": "cat"}]
ASKED = {"annotations": [{"question_id": 1, "answers": ANSWERS}]}
LABEL = [{"pairID": "1", "label": "neutral"}]
CAPTION = [{"image_id": 1, "caption": "a dog"}]
BAD: list[tuple[str, Any, Any, str]] = [
    ("vqa", [], ASKED, r"p: .*question_id"),
    ("vqa", [*VQA, {"question_id": 99, "answer": "cat"}], ASKED, "unknown id 99"),
    (
        "vqa",
        VQA,
        {"annotations": [*ASKED["annotations"], {"question_id": 2, "answers": ANSWERS}]},
        "no prediction .* 2",
    ),
    ("vqa", [*VQA, *VQA], ASKED, "question_id 1 occurs twice"),
    ("vqa", [{"identifier": "dev-1-0-0"}], ASKED, "question_id"),
    ("vqa", {"annotations": []}, ASKED, "question_id"),
    ("vqa", [{"question_id": 1, "answer": None}], ASKED, "record 1: wanted answer"),
    ("vqa", "not JSON", ASKED, "p: wanted a list"),
    ("vqa", VQA, {"annotations": 3}, "r: .* int in annotations"),
    ("vqa", VQA, {"annotations": ["cat"]}, "r, record 1"),
    ("vqa", VQA, {"annotations": [{"question_id": 1, "answers": ["cat"]}]}, "r, record 1: wanted answers"),
    ("vqa", VQA, {"annotations": [{"question_id": 1, "answers": [{"answer_id": 1}]}]}, "r, record 1: wanted answers"),
    ("entailment", "[1]", "", "p, line 1"),
    ("entailment", LABEL, [{"pairID": "1", "gold_label": "-"}], "r: label '-'"),
    ("entailment", [{"pairID": "1", "label": "maybe"}], [{"pairID": "1", "gold_label": "neutral"}], "p: label 'maybe'"),
    ("pairs", "a,b,c", "", "p, row 1"),
    ("pairs", "q0,True", [{"identifier": "q0", "label": "True"}], "r: identifier 'q0'"),
    ("pairs", "dev-1-0-0,yes", [{"identifier": "dev-1-0-0", "label": "True"}], "p: .* 'yes'"),
    ("caption", CAPTION, {"annotations": ["a dog"]}, "r: wanted COCO"),
    ("caption", CAPTION, {"annotations": None}, "r: wanted COCO"),
    ("caption", CAPTION, {"annotations": CAPTION, "images": 7}, "r: .* int in images"),
]


@pytest.mark.parametrize("task, predictions, references, message", BAD)
def test_files_that_do_not_fit_are_refused(tmp_path, task, predictions, references, message):
    for name, content in (("p", predictions), ("r", references)):
        as_lines = (task, name) in [("entailment", "p"), ("entailment", "r"), ("pairs", "r")]
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:
            (write_lines if as_lines and isinstance(content, list) else write_json)(tmp_path / name, content)
    with pytest.raises(RunError, match=message) as error:
        score(task, tmp_path / "p", tmp_path / "r")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="task"):
        score("vqa2", tmp_path / "p", tmp_path / "r")


NAMES = [f"dev-{i}-0-0" for i in range(4)]
TEXTS = ["a red square", "a blue square", "a dog", "a cat"]
NAMED = list(zip(NAMES, TEXTS, strict=True))
HALF_RIGHT: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "vqa": (
        [{"question_id": n, "answers": [{"answer": a, "answer_id": k} for k in range(10)]} for n, a in NAMED],
        [{"answer": a} for a in (*TEXTS[:2], "no", "no")],
    ),
    "entailment": (
        [{"pairID": n, "gold_label": "neutral"} for n in NAMES],
        [{"label": x} for x in ("neutral", "entailment", "neutral", "contradiction")],
    ),
    "pairs": (
        [{"identifier": n, "label": "true" if i % 2 else "false"} for i, n in enumerate(NAMES)],
        [{"label": "true"}] * 4,
    ),
    "caption": ([{"image_id": n, "caption": c} for n, c in NAMED], [{"caption": c} for c in TEXTS]),
}


@pytest.mark.parametrize("task", HALF_RIGHT)
def test_written_predictions_are_read_as_those_of_their_samples(tmp_path, task):
    samples, records = HALF_RIGHT[task]
    lines = task in ("entailment", "pairs")
    references = write_lines(tmp_path / "r", samples) if lines else write_json(tmp_path / "r", {"annotations": samples})
    written = tmp_path / "new" / "predictions"
    write_predictions(written, task, [{"sample": i, **r} for i, r in enumerate(records)], samples)
    found = score(task, written, references)
    assert found["examples"] == 4
    assert found["bleu_1" if task == "caption" else "accuracy"] == (100 if task == "caption" else 50)
    assert [name for name in WRITTEN if are_predictions(name, written.read_bytes())] == [task]


def test_predictions_of_a_task_without_a_benchmark_are_json_lines(tmp_path):
    """JSON allows U+2028 within a string."""
    records = [{"sample": 0, "count": 3}, {"sample": 1, "count": "a\u2028b"}]
    write_predictions(tmp_path / "p", "counting", records, [{"id": "a"}, {}])
    assert read_json_lines(tmp_path / "p", "") == [{"id": "a", "count": 3}, {"id": 1, "count": "a\u2028b"}]
    (tmp_path / "p").write_text('{"id": "a\u2028b"}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "p", "") == [{"id": "a\u2028b"}]
    write_predictions(tmp_path / "p", "counting", records[:1], [{"id": "a"}])
    content = (tmp_path / "p").read_bytes()
    assert are_predictions("counting", content)
    assert not any(are_predictions(task, content) for task in WRITTEN)
    assert not any(are_predictions("counting", other) for other in (b"a note", b"[1]", b"[]", b'{"a": 1}'))
