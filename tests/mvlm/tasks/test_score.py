"""Scores of prediction files in published formats, and what is wrong with files."""

import json
import subprocess
import sys

import pytest

from mvlm.errors import ConfigError, RunError
from mvlm.tasks.records import WRITTEN, are_predictions, read_json_lines, write_predictions
from mvlm.tasks.score import score


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def vqa_files(tmp_path):
    annotations = [
        {
            "question_id": 10 + i, "image_id": i // 2, "question_type": "what", "answer_type": "other",
            "multiple_choice_answer": "cat", "answers": [{"answer": "cat", "answer_id": a} for a in range(1, 11)],
        }
        for i in range(6)
    ]  # fmt: skip
    answers = [{"question_id": 10 + i, "answer": "cat" if i < 3 else "dog"} for i in range(6)]
    return write_json(tmp_path / "answers.json", answers), write_json(
        tmp_path / "val.json", {"annotations": annotations}
    )


def test_vqa_answers(vqa_files):
    found = score("vqa", *vqa_files)
    assert found["accuracy"] == 50
    assert found["examples"] == 6
    assert found["accuracy_95"] == [0, 100]  # three images: right, half right, wrong


@pytest.mark.parametrize("number", [1, 3, 4])
def test_questions_with_too_few_answers_are_told(tmp_path, caplog, number):
    """A single answer counts as none, whatever is predicted."""
    answers = [{"answer": "red", "answer_id": k} for k in range(number)]
    references = write_json(tmp_path / "r.json", {"annotations": [{"question_id": 1, "answers": answers}]})
    predictions = write_json(tmp_path / "p.json", [{"question_id": 1, "answer": "red"}])
    full = score("vqa", predictions, references)["accuracy"] == 100
    assert full == (number > 3) == ("1 of 1 questions have too few answers" not in caplog.text)


def test_a_model_is_compared_with_another(vqa_files, tmp_path):
    answers, references = vqa_files
    better = json.loads(answers.read_text())
    for record in better:
        record["answer"] = "cat"
    found = score("vqa", write_json(tmp_path / "better.json", better), references, other=answers)["compared"]
    assert (found["other"], found["difference"]) == (50, 50)
    assert found["mcnemar_p"] == pytest.approx(0.25)  # 3 : 0


def test_pairs(tmp_path):
    predictions = tmp_path / "predictions.csv"
    predictions.write_text("dev-1-0-0,True\ndev-1-1-0,true\ndev-2-0-0,False\n")
    rows = [("dev-1-0-0", "True"), ("dev-1-1-0", "False"), ("dev-2-0-0", "False")]
    lines = [{"identifier": name, "sentence": "one is left", "label": label} for name, label in rows]
    found = score("pairs", predictions, write_lines(tmp_path / "dev.json", lines))
    assert (found["accuracy"], found["consistency"]) == (pytest.approx(200 / 3), 50)


def test_entailment(tmp_path):
    labels = ["contradiction", "neutral", "entailment", "entailment"]
    lines = [
        {"pairID": f"{i}", "gold_label": label, "Flickr30K_ID": "7", "sentence1": "", "sentence2": ""}
        for i, label in enumerate(labels)
    ]
    found = score(
        "entailment",
        write_lines(tmp_path / "p.jsonl", [{"pairID": f"{i}", "label": "entailment"} for i in range(4)]),
        write_lines(tmp_path / "test.jsonl", lines),
    )
    assert found["accuracy"] == 50
    assert found["recall"] == {"contradiction": 0, "neutral": 0, "entailment": 100}


@pytest.mark.parametrize("name", ["Flickr30K_ID", "Flickr30kID", "Flikr30kID"])
def test_intervals_of_entailment_are_over_images_in_every_release(tmp_path, name):
    lines = [{"pairID": f"{i}", "gold_label": "neutral", name: f"{i % 2}.jpg"} for i in range(40)]
    given = [{"pairID": f"{i}", "label": "neutral" if i % 2 else "entailment"} for i in range(40)]
    found = score("entailment", write_lines(tmp_path / "p", given), write_lines(tmp_path / "r", lines))
    assert found["accuracy_95"] == [0, 100]  # two images: one all right, one all wrong


def test_a_wrong_label_names_its_file(tmp_path):
    given = write_lines(tmp_path / "p.jsonl", [{"pairID": "1", "label": "neutral"}])
    with pytest.raises(RunError, match=r"r\.jsonl: label '-': wanted one of contradiction"):
        score("entailment", given, write_lines(tmp_path / "r.jsonl", [{"pairID": "1", "gold_label": "-"}]))


def test_intervals_of_pairs_are_over_sets_of_images(tmp_path):
    """Four pairs of one set are judged alike, so with two sets the interval is as wide as it can be."""
    names = [f"dev-{images}-{pair}-0" for images in range(2) for pair in range(4)]
    rows = "".join(f"{name},{'True' if name.startswith('dev-0') else 'False'}\n" for name in names)
    (tmp_path / "p.csv").write_text(rows)
    wanted = write_lines(tmp_path / "r.jsonl", [{"identifier": name, "label": "True"} for name in names])
    assert score("pairs", tmp_path / "p.csv", wanted)["accuracy_95"] == [0, 100]


def test_identifiers_of_another_form_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("q0,True\n")
    wanted = write_lines(tmp_path / "r.jsonl", [{"identifier": "q0", "label": "True"}])
    with pytest.raises(RunError, match=r"r\.jsonl: identifier 'q0': wanted the form"):
        score("pairs", tmp_path / "p.csv", wanted)


def test_json_lines_may_hold_line_separators_of_unicode(tmp_path):
    """JSON allows U+2028 within a string."""
    (tmp_path / "a.jsonl").write_text('{"id": "1", "label": "a\u2028b"}\n', encoding="utf-8")
    assert read_json_lines(tmp_path / "a.jsonl", "lines") == [{"id": "1", "label": "a\u2028b"}]


def test_captions_of_coco_are_written_with_its_numbers(tmp_path):
    records = [{"sample": 0, "caption": "a"}, {"sample": 1, "caption": "b"}]
    write_predictions(tmp_path / "p.json", "caption", records, [{"image_id": "coco 391895"}, {"image_id": "own 1"}])
    assert [row["image_id"] for row in json.loads((tmp_path / "p.json").read_text())] == [391895, "own 1"]


def test_captions(tmp_path):
    annotations = [
        {"image_id": i, "caption": text} for i in (1, 2) for text in ("a red heart left of it", f"number {i}")
    ]
    results = [{"image_id": 1, "caption": "a red heart left of it"}, {"image_id": 2, "caption": "number 2"}]
    found = score("caption", write_json(tmp_path / "r.json", results),
                  write_json(tmp_path / "c.json", {"annotations": annotations}))  # fmt: skip
    assert found["bleu_4"] == pytest.approx(100)
    assert found["cider_d"] > 0


@pytest.mark.parametrize("form", ["lines", "figures"])
def test_points(tmp_path, form):
    """As JSON lines, or among the figures of an evaluation."""
    points = [{"id": 1, "x": 5, "y": 5}, {"id": 2, "x": 50, "y": 50}]
    file = tmp_path / "points"
    found = score(
        "grounding",
        write_lines(file, points) if form == "lines" else write_json(file, {"task": "grounding", "records": points}),
        write_lines(tmp_path / "b.jsonl", [{"id": i, "box": [0, 0, 10, 10], "size": [100, 100]} for i in (1, 2)]),
    )
    assert (found["accuracy"], found["center"], found["chance"]) == (50, 0, 1)


def test_a_single_point_and_files_without_points(tmp_path):
    truth = write_lines(tmp_path / "b.jsonl", [{"id": 1, "box": [0, 0, 10, 10], "size": [100, 100]}])
    point = {"id": 1, "x": 5, "y": 5}
    assert score("grounding", write_lines(tmp_path / "p.jsonl", [point]), truth)["accuracy"] == 100
    wanted = "wanted JSON lines {id, x, y}, or what `mvlm eval grounding --out` wrote"
    with pytest.raises(RunError, match=rf"p.json: {wanted}, found int in records"):
        score("grounding", write_json(tmp_path / "p.json", {"records": 3}), truth)
    with pytest.raises(RunError, match=rf"none: {wanted}, could not read it"):
        score("grounding", tmp_path / "none", truth)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[:-1], "found no prediction for 15 \\(1 missing, 0 unknown\\)"),
        (lambda rows: [*rows, {"question_id": 99, "answer": "cat"}], "a prediction for the unknown id 99"),
        (lambda rows: [*rows, rows[0]], "question_id 10 occurs twice"),
        (lambda rows: [{"identifier": "dev-1-0-0"}], "wanted the field 'question_id'; is it a file of another task"),
        (lambda rows: {"annotations": []}, "wanted records with the field 'question_id', found none"),
        (lambda rows: [*rows[:-1], {"question_id": 15, "answer": None}], "record 6: wanted answer as str, found None"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(vqa_files, change, message):
    answers, references = vqa_files
    write_json(answers, change(json.loads(answers.read_text())))
    with pytest.raises(RunError, match=message):
        score("vqa", answers, references)


ANSWER = {"answer": "cat", "answer_id": 1}
CAPTION = [{"image_id": 1, "caption": "a dog"}]


@pytest.mark.parametrize(
    "task, predictions, references, message",
    [
        ("vqa", [], {"annotations": 3}, "r.json: wanted VQA annotations, .* found int in annotations"),
        ("vqa", [], {"annotations": ["cat"]}, "r.json, record 1: wanted an object, found str"),
        ("vqa", [], {"annotations": [{"question_id": 1, "answers": ["cat"]}]}, "record 1: wanted answers as objects"),
        ("vqa", [], {"annotations": [{"question_id": 1, "answers": [{"answer_id": 1}]}]}, "wanted answers as objects"),
        ("caption", CAPTION, {"annotations": ["a dog"]}, "r.json: wanted COCO caption annotations, found none"),
        ("caption", CAPTION, {"annotations": None}, "r.json: wanted COCO caption annotations, found none"),
        ("caption", CAPTION, {"annotations": CAPTION, "images": 7}, "found int in images"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path, task, predictions, references, message):
    given = predictions or [{"question_id": 1, "answer": "cat"}]
    with pytest.raises(RunError, match=message) as error:
        score(task, write_json(tmp_path / "p.json", given), write_json(tmp_path / "r.json", references))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"box": [1, 2, 3]}, "wanted box as 4 numbers"),
        ({"box": ["1", "2", "3", "4"]}, "wanted box as 4 numbers"),
        ({"box": [10**400, 2, 3, 4]}, "wanted box as 4 numbers"),
        ({"size": [0, 10]}, "wanted a size above 0"),
    ],
)
def test_boxes_that_are_none_are_refused(tmp_path, change, message):
    points = write_lines(tmp_path / "p.jsonl", [{"id": 1, "x": 5, "y": 5}])
    boxes = write_lines(tmp_path / "b.jsonl", [{"id": 1, "box": [0, 0, 10, 10], "size": [100, 100]} | change])
    with pytest.raises(RunError, match=rf"b\.jsonl, record 1: {message}"):
        score("grounding", points, boxes)


def test_a_question_without_a_type_counts_among_all(tmp_path):
    given = write_json(tmp_path / "p.json", [{"question_id": i, "answer": "cat"} for i in (1, 2)])
    rows = [{"question_id": i, "question_type": kind, "answers": [ANSWER]} for i, kind in ((1, None), (2, "what"))]
    found = score("vqa", given, write_json(tmp_path / "r.json", {"annotations": rows}))
    assert list(found["by_question_type"]) == ["all", "what"]


def test_files_of_another_kind_are_refused(vqa_files, tmp_path):
    answers, references = vqa_files
    with pytest.raises(ConfigError, match="task: wanted one of vqa, pairs"):
        score("vqa2", answers, references)
    with pytest.raises(RunError, match="wanted a list of"):
        score("vqa", tmp_path / "none.json", references)
    with pytest.raises(RunError, match="line 1: wanted a JSON object, found list"):
        score("entailment", answers, references)
    with pytest.raises(RunError, match="row 1: wanted 2 fields"):
        score("pairs", answers, references)
    unknown = write_lines(tmp_path / "u.jsonl", [{"pairID": "1", "label": "maybe"}])
    truth = write_lines(tmp_path / "t.jsonl", [{"pairID": "1", "gold_label": "neutral"}])
    with pytest.raises(RunError, match="label 'maybe': wanted one of contradiction, neutral, entailment"):
        score("entailment", unknown, truth)


@pytest.mark.slow
def test_scoring_imports_neither_torch_nor_a_model(vqa_files):
    program = (
        "import sys\nfrom pathlib import Path\nfrom mvlm.commands.evaluate import score\n"
        "score('vqa', *map(Path, sys.argv[1:]))\n"
        "assert not {'torch', 'mvlm.model', 'PIL'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, vqa_files)], check=True, timeout=60, capture_output=True)


def test_captions_of_scenes_have_facts(tmp_path):
    scene = {"size": [128, 128], "objects": [{"name": "dog", "colour": None, "box": [0, 0, 40, 40]}]}
    results = write_json(tmp_path / "r.json", [{"image_id": i, "caption": "a dog"} for i in (1, 2)])
    annotations = [{"image_id": i, "caption": text} for i in (1, 2) for text in ("a dog", f"number {i}")]
    document = {"images": [{"id": i, "scene": scene} for i in (1, 2)], "annotations": annotations}
    found = score("caption", results, write_json(tmp_path / "a.json", document))
    assert (found["fact_precision"], found["fact_recall"]) == (100, 100)
    kitchens = {"images": [{"id": i, "scene": "kitchen"} for i in (1, 2)], "annotations": annotations}
    assert "fact_f1" not in score("caption", results, write_json(tmp_path / "k.json", kitchens))
    document["images"].pop()
    with pytest.raises(RunError, match="wanted a scene for each of 2 images with captions, or for none, found 1"):
        score("caption", results, write_json(tmp_path / "b.json", document))


@pytest.mark.parametrize("task", ["vqa", "entailment", "pairs", "caption"])
def test_written_predictions_are_read_as_those_of_their_samples(tmp_path, task):
    """Half of the predictions are right. They are scored against the published format of the references."""
    names = [f"dev-{i}-0-0" for i in range(4)]
    labels, answers = ["true", "false", "true", "false"], ["a red square", "a blue square", "a dog", "a cat"]
    lines = tmp_path / "references.json"
    if task == "vqa":
        given = [[{"answer": a, "answer_id": k} for k in range(10)] for a in answers]
        samples = [{"question_id": n, "answers": g} for n, g in zip(names, given, strict=True)]
        records = [{"answer": "a red square"}, {"answer": "a blue square"}, {"answer": "no"}, {"answer": "no"}]
        write_json(lines, {"annotations": [s | {"question_type": "", "answer_type": ""} for s in samples]})
    elif task == "entailment":
        samples = [{"pairID": n, "gold_label": "neutral"} for n in names]
        records = [{"label": x} for x in ("neutral", "entailment", "neutral", "contradiction")]
        write_lines(lines, samples)
    elif task == "pairs":
        samples = [{"identifier": n, "label": x} for n, x in zip(names, labels, strict=True)]
        records = [{"label": "true"}] * 4
        write_lines(lines, samples)
    else:
        samples = [{"image_id": n} for n in names]
        records = [{"caption": c} for c in answers]
        images = [{"image_id": n, "caption": c} for n, c in zip(names, answers, strict=True)]
        write_json(lines, {"annotations": images})
    written = tmp_path / "new" / "predictions"
    write_predictions(written, task, [{"sample": i, **r} for i, r in enumerate(records)], samples)
    found = score(task, written, lines)
    assert found["examples"] == 4
    assert found["bleu_1" if task == "caption" else "accuracy"] == (100 if task == "caption" else 50)


def test_predictions_of_a_task_without_a_benchmark_are_json_lines(tmp_path):
    records = [{"sample": 0, "count": 3}, {"sample": 1, "count": 4}]
    write_predictions(tmp_path / "p", "counting", records, [{"id": "a"}, {}])
    assert read_json_lines(tmp_path / "p", "") == [{"id": "a", "count": 3}, {"id": 1, "count": 4}]
    content = (tmp_path / "p").read_bytes()
    assert are_predictions("counting", content)
    assert not any(are_predictions(task, content) for task in WRITTEN)
    assert not any(are_predictions("counting", other) for other in (b"a note", b"[1]", b"[]", b'{"a": 1}'))
