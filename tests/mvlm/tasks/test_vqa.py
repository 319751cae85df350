"""Lists of answers: where they come from, and what is refused."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from mvlm.errors import RunError
from mvlm.runs.load import load_model
from mvlm.tasks.metrics.vqa import answer_accuracy
from mvlm.tasks.task import TaskOptions
from mvlm.tasks.vqa import VisualQuestionAnswering, annotator_shares
from mvlm.tasks.vqa import questions as task_questions
from mvlm_dataloading import DataError, ShardWriter, ViewOptions, make_view, open_dataset
from support.questions import write_questions
from support.scenes import png, scene


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


def make_state(questions, split="train", **options):
    return VisualQuestionAnswering.make_state(open_dataset(questions, split), TaskOptions(**options))


def test_the_list_is_the_frequent_answers(questions):
    # Of 32 questions, 16 are about the ground of scenes 0 to 15, which is white, and 4 about each colour.
    colours = ["blue", "green", "red", "yellow"]
    assert make_state(questions, answers="masked") == {"answers": ["white", *colours]}
    assert make_state(questions, min_count=4)["answers"] == ["white", *colours]


def ask(folder, answers) -> Path:
    with ShardWriter(folder, name="q", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("0", png(scene(0)[0]), ["what colour?"], {"question_id": 0, "answers": answers})
    return folder


@pytest.mark.parametrize(
    "answers, message",
    [
        (["red"], r"key 0: wanted answers as objects with the text `answer`, found 'red'"),
        ("red", "wanted answers as objects with the text `answer`, found 'red'"),
        ([{"answer": 3}], "wanted answers as objects with the text `answer`, found {'answer': 3}"),
        ([{"answer": "red", "answer_id": 1}] * 10, "wanted answers with an `answer_id` of their own, found .* twice"),
        ([{"answer": "red"}] * 10, "wanted answers with an `answer_id` of their own, found {'answer': 'red'} twice"),
    ],
)
def test_answers_that_the_metric_cannot_compare_are_refused(tmp_path, answers, message):
    with pytest.raises(DataError, match=message):
        task_questions(open_dataset(ask(tmp_path / "d", answers), "train"))


@pytest.mark.parametrize("number", [1, 3, 4])
def test_too_few_answers_are_told(tmp_path, caplog, number):
    """The metric compares an answer with three others, so one of fewer than four cannot count in full."""
    answers = [{"answer": "red", "answer_id": k} for k in range(number)]
    records = task_questions(open_dataset(ask(tmp_path / "d", answers), "train"))
    full = answer_accuracy("red", records[0]["answers"]) == 1
    assert full == (number > 3) == ("1 of 1 questions have too few answers" not in caplog.text)


def test_an_answer_counts_where_most_annotators_gave_it(tmp_path):
    """Red has most votes of questions 1 to 3, blue of 4 and 5, though green was given to all of them by somebody."""
    votes = [["red"] * 6 + ["green"] * 4] * 3 + [["green"] + ["blue"] * 9] * 2
    with ShardWriter(tmp_path / "d", name="q", source="", licence="", attribution="", recipe={}) as writer:
        for i, given in enumerate(votes):
            answers = [{"answer": answer, "answer_id": n} for n, answer in enumerate(given)]
            writer.add(str(i), png(scene(i)[0]), ["what colour?"], {"question_id": i, "answers": answers})
    assert make_state(tmp_path / "d")["answers"] == ["red", "blue"]
    assert make_state(tmp_path / "d", min_count=2)["answers"] == ["red", "blue"]
    with pytest.raises(DataError, match="wanted at least 2 answers with 3 training questions each, found 1"):
        make_state(tmp_path / "d", min_count=3)


def test_copies_in_a_weighted_view_make_no_answer_frequent(questions, tmp_path):
    """Each colour answers four questions, and the ground more."""
    make_view(tmp_path / "view", [questions], ViewOptions(leaks="keep"), weights=[2])
    for data in (questions, tmp_path / "view"):
        with pytest.raises(DataError, match="at least 2 answers with 5 training questions each, found 1"):
            make_state(data, min_count=5)


def test_a_classifier_starts_from_the_mean_target_of_each_answer(questions, trained):
    """Half of the questions have one answer and an eighth each of the four others, before anything is learned."""
    state = make_state(questions, answers="classifier")
    assert state["means"] == [0.5, 0.125, 0.125, 0.125, 0.125]
    task = VisualQuestionAnswering(load_model(trained).network, TaskOptions(answers="classifier"), state)
    probabilities = task.head(torch.randn(3, task.head.dense.in_features)).sigmoid()
    torch.testing.assert_close(probabilities, torch.tensor([state["means"]] * 3))
    older = VisualQuestionAnswering(
        load_model(trained).network, TaskOptions(answers="classifier"), {"answers": state["answers"]}
    )
    assert not older.head.answers.bias.any()


def test_a_file_gives_the_list(questions, tmp_path):
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(["Red!", "blue", "red", "the"]))
    assert make_state(questions, answer_list=file, answers="masked") == {"answers": ["red", "blue"]}
    assert make_state(questions, answer_list=file)["answers"] == ["red", "blue"]


@pytest.mark.parametrize(
    "content, error, message",
    [
        (["red", "blue", "black"], DataError, "found 1 of 3 that are none, such as 'black'; make the list from the tr"),
        ({"red": 0}, DataError, "wanted a JSON list of answers"),
        (["red"], DataError, r"wanted at least 2 answers in .*answers\.json, found 1; add answers to the file"),
        (None, RunError, "could not read it"),
    ],
)
def test_lists_from_elsewhere_are_refused(questions, tmp_path, content, error, message):
    """Black is the ground of some test scenes, and of no training scene."""
    file = tmp_path / "answers.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        make_state(questions, answer_list=file)


def test_the_test_split_gives_no_list(questions):
    with pytest.raises(DataError, match="from which alone the list of answers may come, found the split test"):
        make_state(questions, "test")


def test_targets_are_shares_of_annotators_but_for_a_classifier(trained, tmp_path):
    """Seven of ten say two, two say 2, which is the same, and one says three. Elsewhere most say three."""
    given = ["two"] * 7 + ["2"] * 2 + ["three"]
    answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(given)]
    assert annotator_shares({"answers": answers}) == {"2": 0.9, "3": 0.1}
    with ShardWriter(tmp_path / "d", name="q", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("0", png(scene(0)[0]), ["how many?"], {"question_id": 1, "answers": answers})
        other = [{"answer": "three" if i else "two", "answer_id": i} for i in range(10)]
        writer.add("1", png(scene(1)[0]), ["how many?"], {"question_id": 2, "answers": other})
    dataset = open_dataset(tmp_path / "d", "train")
    forms: list[tuple[Literal["classifier", "masked"], list[float]]]
    forms = [("masked", [0.9, 0.1]), ("classifier", [1.0, 0.3])]
    for form, values in forms:
        options = TaskOptions(answers=form)
        state = VisualQuestionAnswering.make_state(dataset, options)
        assert state["answers"] == ["2", "3"]
        ids, targets = VisualQuestionAnswering(load_model(trained).network, options, state).targets(dataset)
        assert ids[0, :3].tolist() == [0, 1, -1]
        assert targets[0, :3].tolist() == pytest.approx([*values, 0])


def test_an_answer_twice_on_the_list_is_refused(trained):
    with pytest.raises(DataError, match="wanted at least 2 different ones"):
        VisualQuestionAnswering(load_model(trained).network, TaskOptions(), {"answers": ["red", "red"]})
