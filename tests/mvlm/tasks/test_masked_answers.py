"""Masked answers against one text at a time, built from lists of tokens, and their choice among a list."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.runs.load import load_model
from mvlm.tasks.finetune import finetune, open_inputs
from mvlm.tasks.masked_answers import AnswerTable, answers_loss, likeliest, mask_features, with_masks
from mvlm.tasks.task import TaskOptions
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm.training.run import share_cut
from mvlm_dataloading import open_dataset
from support.models import micro_batch, micro_model
from support.questions import finetune_config, write_questions

ANSWERS = ["red", "blue square", "top left on white", "red and blue", "yes", "no"]
OF = torch.tensor([0, 3, 1, 1, 4, 0, 2])
IDS = torch.tensor([0, 1, 2, 5, 3, 3, 4])
both = pytest.mark.parametrize("plan", ["plain", "fast"])


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


def test_masks_stand_behind_the_first_token_of_each_text():
    batch, _ = micro_batch()
    for given in (batch, shared(batch)):
        found, wanted = with_masks(given, 3, 4), []
        for start, stop in pairwise(given.cu_seqlens.tolist()):
            cls, *rest = given.tokens[start:stop].tolist()
            wanted.append([cls, 4, 4, 4, *rest])
        assert found.tokens.tolist() == [token for text in wanted for token in text]
        assert found.cu_seqlens.diff().tolist() == [len(text) for text in wanted]
        assert found.max_length == max(map(len, wanted))
        if given.caption_of is not None:
            assert found.sample_tokens == sum(len(wanted[i]) for i in given.caption_of.tolist())


@pytest.mark.slow
@both
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
    x = mask_features(model, batch, masks, plan)
    assert x.shape == (len(batch.sample_id), masks, model.config.width)
    loss, accuracy = answers_loss(model, x, table.select(IDS), OF, weights, plan)
    wanted, right, number = 0.0, 0, 0
    for answer, of, weight in zip(IDS.tolist(), OF.tolist(), weights.tolist(), strict=True):
        tokens = tokenizer.encode([ANSWERS[answer]], model.config.text_length)[0].tolist()[1:]  # [SEP] included
        log_p = log_probabilities(model, batch, masks, of)
        wanted -= weight * sum(log_p[place, token] for place, token in enumerate(tokens))
        right += sum(log_p[place].argmax() == token for place, token in enumerate(tokens))
        number += len(tokens)
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert accuracy.item() == pytest.approx(right / number)


@pytest.mark.slow
@torch.no_grad()
def test_the_likeliest_answer_of_the_list_is_chosen(parts, tokenizer, monkeypatch):
    model, batch, table = parts
    masks = table.masks
    x = mask_features(model, batch, masks, "fast")
    encoded = [tokenizer.encode([answer], model.config.text_length)[0].tolist()[1:] for answer in ANSWERS]
    wanted = []
    for sample in range(len(batch.sample_id)):
        log_p = log_probabilities(model, batch, masks, sample)
        wanted.append(int(np.argmax([sum(log_p[i, t] for i, t in enumerate(tokens)) for tokens in encoded])))
    assert len(set(wanted)) > 1
    assert likeliest(model, x, table).tolist() == wanted
    monkeypatch.setattr("mvlm.tasks.masked_answers.LOGITS_AT_A_TIME", 1)  # a question at a time
    assert likeliest(model, x, table).tolist() == wanted


def test_questions_are_cut_behind_the_masks(tokenizer):
    model = micro_model(text_length=24)
    task = VisualQuestionAnswering(model, TaskOptions(answers="masked"), {"answers": ANSWERS})
    task.set_tokenizer(tokenizer)
    longest = max(len(tokenizer.encode([answer], 40)[0]) for answer in ANSWERS) - 1  # its [SEP] included
    assert task.masks == longest
    assert task.loader_options() == {"text_length": 24 - longest}


def test_texts_that_are_cut_are_counted(trained, tmp_path, caplog):
    """Questions about the ground have other lengths than those about an object."""
    data = write_questions(tmp_path / "data")
    dataset, tokenizer = open_dataset(data, "train"), load_model(trained).tokenizer
    lengths = [len(tokenizer.encode([dataset.captions(i)[0]], 99)[0]) for i in range(len(dataset))]
    assert len(set(lengths)) > 1
    for longest in set(lengths):
        assert share_cut(dataset, tokenizer, longest) == pytest.approx(np.mean([n > longest for n in lengths]))
    for question_length, cut in ((max(lengths), False), (max(lengths) - 1, True)):
        caplog.clear()
        open_inputs(finetune_config(trained, data, tmp_path / "run", "vqa", question_length=question_length))
        assert ("texts have more than" in caplog.text) == cut


def test_a_text_without_room_for_a_question_is_refused_before_anything_is_written(trained, tmp_path):
    data = write_questions(tmp_path / "data")
    config = finetune_config(trained, data, tmp_path / "run", "vqa", answers="masked", question_length=9)
    with pytest.raises(ConfigError, match=r"question_length: wanted at least \d+, room for the \d masks .* got 9"):
        finetune(config)
    assert not (tmp_path / "run").exists()


@both
@torch.no_grad()
def test_a_batch_without_a_listed_answer_has_no_loss_and_no_accuracy(parts, plan):
    model, batch, table = parts
    none = torch.empty(0, dtype=torch.int64)
    x = mask_features(model, batch, table.masks, plan)
    loss, accuracy = answers_loss(model, x, table.select(none), none, torch.empty(0, dtype=torch.float64), plan)
    assert (loss.item(), accuracy.item()) == (0, 0)
