"""Visual question answering: lists of answers and targets; masked answers against one text at a time."""

import json
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from mvlm.errors import RunError
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.load import load_model
from mvlm.tasks.task import TaskOptions
from mvlm.tasks.vqa import (
    AnswerTable,
    VisualQuestionAnswering,
    annotator_shares,
    answers_loss,
    likeliest,
    mask_features,
)
from mvlm.tasks.vqa import questions as task_questions
from mvlm_dataloading import DataError, ViewOptions, make_view, open_dataset
from support.models import micro_batch, micro_model
from support.scenes import write_samples


def make_state(questions, split="train", **options):
    return VisualQuestionAnswering.make_state(open_dataset(questions, split), TaskOptions(**options))


def test_the_list_is_the_frequent_answers_or_that_of_a_file(questions, tmp_path):
    # Of 32 questions, 16 are about the ground of scenes 0 to 15, which is white, and 4 about each colour.
    colours = ["blue", "green", "red", "yellow"]
    assert make_state(questions, answers="masked") == {"answers": ["white", *colours]}
    assert make_state(questions, min_count=4)["answers"] == ["white", *colours]
    make_view(tmp_path / "view", [questions], ViewOptions(leaks="keep"), weights=[2])  # copies count once
    assert make_state(tmp_path / "view", min_count=4)["answers"] == ["white", *colours]
    for data in (questions, tmp_path / "view"):
        with pytest.raises(DataError, match="found 1"):
            make_state(data, min_count=5)
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(["Red!", "blue", "red", "the"]))
    assert make_state(questions, answer_list=file, answers="masked") == {"answers": ["red", "blue"]}


@pytest.mark.parametrize(
    "content, error, message",
    [
        (["red", "blue", "black"], DataError, "'black'"),  # the ground of some test scenes, and of no training scene
        ({"red": 0}, DataError, "a JSON list"),
        (["red"], DataError, r"answers\.json, found 1"),
        (None, RunError, "answers"),
    ],
)
def test_lists_from_elsewhere_are_refused(questions, trained, tmp_path, content, error, message):
    file = tmp_path / "answers.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        make_state(questions, answer_list=file)
    with pytest.raises(DataError, match="split test"):
        make_state(questions, "test")
    with pytest.raises(DataError, match="answers"):
        VisualQuestionAnswering(load_model(trained).network, TaskOptions(), {"answers": ["red", "red"]})


def ask(folder, *answers):
    """A data set with a question for each of these answers."""
    return write_samples(folder, [(i, ["what?"], {"question_id": i, "answers": x}) for i, x in enumerate(answers)])


def annotators(given: list[str]) -> list[dict]:
    return [{"answer": answer, "answer_id": n} for n, answer in enumerate(given)]


@pytest.mark.parametrize(
    "answers", [["red"], "red", [{"answer": 3}], [{"answer": "red", "answer_id": 1}] * 10, [{"answer": "red"}] * 10]
)
def test_answers_that_the_metric_cannot_compare_are_refused(tmp_path, answers):
    with pytest.raises(DataError, match="key 00: wanted answers"):
        task_questions(ask(tmp_path / "d", answers))


def test_an_answer_counts_where_most_annotators_gave_it(tmp_path):
    """Red has most votes of questions 1 to 3, blue of 4 and 5, though green was given to all of them by somebody."""
    votes = [["red"] * 6 + ["green"] * 4] * 3 + [["green"] + ["blue"] * 9] * 2
    ask(tmp_path / "d", *map(annotators, votes))
    assert make_state(tmp_path / "d")["answers"] == ["red", "blue"]
    assert make_state(tmp_path / "d", min_count=2)["answers"] == ["red", "blue"]
    with pytest.raises(DataError, match="found 1"):
        make_state(tmp_path / "d", min_count=3)


def test_a_classifier_starts_from_the_mean_target_of_each_answer(questions, trained):
    """Half of the questions have one answer and an eighth each of the four others, before anything is learned."""
    state = make_state(questions, answers="classifier")
    assert state["means"] == [0.5, 0.125, 0.125, 0.125, 0.125]
    older = VisualQuestionAnswering(
        load_model(trained).network, TaskOptions(answers="classifier"), {"answers": state["answers"]}
    )
    assert not older.head.answers.bias.any()


def test_targets_are_shares_of_annotators_but_for_a_classifier(trained, tmp_path):
    """Seven of ten say two, two say 2, which is the same, and one says three. Elsewhere most say three."""
    answers = annotators(["two"] * 7 + ["2"] * 2 + ["three"])
    assert annotator_shares({"answers": answers}) == {"2": 0.9, "3": 0.1}
    dataset = ask(tmp_path / "d", answers, annotators(["two"] + ["three"] * 9))
    forms: list[tuple[Literal["classifier", "masked"], list[float]]]
    forms = [("masked", [0.9, 0.1]), ("classifier", [1.0, 0.3])]
    for form, values in forms:
        options = TaskOptions(answers=form)
        state = VisualQuestionAnswering.make_state(dataset, options)
        assert state["answers"] == ["2", "3"]
        ids, targets = VisualQuestionAnswering(load_model(trained).network, options, state).targets(dataset)
        assert ids[0, :3].tolist() == [0, 1, -1]
        assert targets[0, :3].tolist() == pytest.approx([*values, 0])


ANSWERS = ["red", "blue square", "top left on white", "red and blue", "yes", "no"]
OF = torch.tensor([0, 3, 1, 1, 4, 0, 2])
IDS = torch.tensor([0, 1, 2, 5, 3, 3, 4])


@pytest.fixture(scope="module")
def parts(tokenizer):
    model = micro_model(text_length=24)
    batch, _ = micro_batch()
    return model, batch, AnswerTable(ANSWERS, tokenizer, model.config.text_length)


def shared(batch):
    """Eight samples of the batch's five images and captions, in another order and with repetitions."""
    images, captions = torch.tensor([4, 0, 0, 2, 1, 3, 3, 4]), torch.tensor([1, 0, 3, 2, 2, 4, 0, 1])
    tokens = int(batch.cu_seqlens.diff()[captions].sum())
    ids = torch.arange(len(images))
    return replace(batch, image_of=images, caption_of=captions, sample_tokens=tokens, sample_id=ids)


@torch.no_grad()
def log_probabilities(model, batch, masks: int, sample: int) -> np.ndarray:
    """Log-probabilities of each token at each mask of one sample (masks, V). Its text is put together as a list."""
    images, captions = (x[sample].item() for x in batch.pairs())
    start, stop = batch.cu_seqlens[captions : captions + 2].tolist()
    cls, *question = batch.tokens[start:stop].tolist()
    text = torch.tensor([cls, *[model.config.mask_token_id] * masks, *question])
    v = model.encode_image(batch.images[images : images + 1])
    w, _ = model.encode_text(text, torch.tensor([0, len(text)], dtype=torch.int32), len(text))
    logits = model.language_head(model.text_cross(w, v)[0, 1 : 1 + masks]).numpy()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("cross_layers", [1, 2])
@torch.no_grad()
def test_the_loss_is_that_of_one_text_at_a_time(parts, tokenizer, plan, share, cross_layers):
    model, batch, table = parts
    if cross_layers != model.config.cross_layers:
        model = micro_model(text_length=24, cross_layers=cross_layers)
    batch = shared(batch) if share else batch
    masks = table.masks
    weights = torch.rand(len(OF), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = mask_features(model, batch, masks, IMPLEMENTATIONS[plan])
    assert x.shape == (len(batch.sample_id), masks, model.config.width)
    loss, accuracy, counted = answers_loss(model, x, table, IDS, OF, weights, IMPLEMENTATIONS[plan])
    wanted, right, number = 0.0, 0, 0
    for answer, of, weight in zip(IDS.tolist(), OF.tolist(), weights.tolist(), strict=True):
        tokens = tokenizer.encode([ANSWERS[answer]], model.config.text_length)[0].tolist()[1:]  # [SEP] included
        log_p = log_probabilities(model, batch, masks, of)
        wanted -= weight * sum(log_p[place, token] for place, token in enumerate(tokens))
        right += sum(log_p[place].argmax() == token for place, token in enumerate(tokens))
        number += len(tokens)
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert (accuracy.item(), counted) == (pytest.approx(right / number), number)
    none = torch.empty(0, dtype=torch.int64)  # a batch without a listed answer
    loss, accuracy, counted = answers_loss(model, x, table, none, none, weights[:0], IMPLEMENTATIONS[plan])
    assert (loss.item(), accuracy.item(), counted) == (0, 0, 0)


@pytest.mark.slow
@torch.no_grad()
def test_the_likeliest_answer_of_the_list_is_chosen(parts, tokenizer, monkeypatch):
    model, batch, table = parts
    masks = table.masks
    x = mask_features(model, batch, masks, IMPLEMENTATIONS["fast"])
    encoded = [tokenizer.encode([answer], model.config.text_length)[0].tolist()[1:] for answer in ANSWERS]
    wanted = []
    for sample in range(len(batch.sample_id)):
        log_p = log_probabilities(model, batch, masks, sample)
        wanted.append(int(np.argmax([sum(log_p[i, t] for i, t in enumerate(tokens)) for tokens in encoded])))
    assert len(set(wanted)) > 1
    assert likeliest(model, x, table).tolist() == wanted
    monkeypatch.setattr("mvlm.tasks.vqa.LOGITS_AT_A_TIME", 1)  # a question at a time
    assert likeliest(model, x, table).tolist() == wanted
