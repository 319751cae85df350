"""Maps of words for a task's prediction, against softmaxes and derivatives by autograd; verdicts told together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mvlm.errors import RunError
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.report.task_examples import confusion, majority, task_maps
from mvlm.tasks.load import find_task, load_model
from mvlm.tasks.task import TaskOptions
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm_dataloading import Batch
from support.maps import spans_of, written_out
from support.pages import Page
from support.scenes import write_samples

TEXT, SIDE = "red top left", 4
FORMS = {
    "classifier": ("vqa", {"answers": ["red", "blue", "no"]}, "blue"),
    "masked": ("vqa", {"answers": ["red", "blue", "no"]}, "blue"),
    "entailment": ("entailment", {"labels": ["contradiction", "neutral", "entailment"]}, "neutral"),
    "pairs": ("pairs", {"labels": ["false", "true"], "images": 2}, "true"),
    "caption": ("caption", {}, TEXT),
}


def made(trained, form: str) -> Any:
    """A task with random weights in its head."""
    name, state, _ = FORMS[form]
    loaded = load_model(trained, text_length=12)
    model, tokenizer = loaded.network, loaded.tokenizer
    options = TaskOptions(answers="masked" if form == "masked" else "classifier")
    task = find_task(name)(model, options, state)
    task.set_tokenizer(tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return task.eval()


def scored(task: Any, form: str, batch: Batch, predicted: str) -> Tensor:
    """The figure whose derivatives make the maps, by other paths than those of `task_maps`."""
    if form == "masked":
        answer, masks = encoded(task, predicted)[1:], [task.config.mask_token_id] * task.masks
        tokens = torch.tensor([batch.tokens[0], *masks, *batch.tokens[1:]])
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        w, key_mask = task.model.encode_text_packed(tokens, bounds, len(tokens)).padded()
        v = task.model.encode_image(batch.images)
        places = torch.arange(len(answer))
        logits = task.model.fill_mask(v, w, key_mask, bounds, 1 + places)
        return logits.log_softmax(1)[places, answer].sum()
    logits = task.head(task.fuse(batch, IMPLEMENTATIONS["plain"], 2 if form == "pairs" else 1))[0]
    if form == "classifier":
        return logits[task.state["answers"].index(predicted)]
    p = logits.double().softmax(0)[task.state["labels"].index(predicted)]
    return (p / (1 - p)).log()


def encoded(task: Any, text: str) -> list[int]:
    return task.tokenizer.encode([text], 12)[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_maps_are_weights_times_the_positive_derivatives_of_the_prediction(trained, form, monkeypatch):
    task, predicted = made(trained, form), FORMS[form][2]
    number = 2 if form == "pairs" else 1
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (3, 32, 32 * number), generator=generator).to(torch.uint8)
    found = task_maps(task, images, TEXT if form != "caption" else "", predicted)
    assert found is not None
    assert all(parameter.grad is None for parameter in task.parameters())

    tokens = torch.tensor(encoded(task, TEXT))
    length, one = len(tokens), torch.zeros(1, dtype=torch.int64)
    # In the last layer of a classifier [CLS] alone has an effect, in that of a masked answer the [MASK]s; in a caption
    # all rows do.
    layer = task.model.text_cross.layers[-1 if form == "caption" else -2].cross_attention
    seen: list[Tensor] = []
    monkeypatch.setattr(layer, "forward", written_out(seen, layer))
    if form == "caption":
        maps = []
        for start, stop in spans_of(task.tokenizer, TEXT)[1:]:
            hidden = tokens.clone()
            hidden[start:stop] = task.config.mask_token_id
            v, bounds = task.model.encode_image(images[None]), torch.tensor([0, length], dtype=torch.int32)
            w, mask = task.model.encode_text_packed(hidden, bounds, length).padded()
            places = torch.arange(start, stop)
            logits = task.model.fill_mask(v, w, mask, bounds, places)
            logits.log_softmax(1)[torch.arange(stop - start), tokens[start:stop]].sum().backward()
            p = seen.pop()
            assert p.grad is not None
            maps.append((p * p.grad.clamp(min=0)).mean(1)[:, start:stop, 1:].mean(1))
        words = TEXT.split()
    else:
        batch = Batch(images[None], tokens, torch.tensor([0, length], dtype=torch.int32), length, one, one, one)
        score = scored(task, form, batch, predicted)
        score.backward()
        (p,) = seen
        assert p.grad is not None
        cam = (p * p.grad.clamp(min=0)).mean(1)  # (n, L, M)
        before = task.masks if form == "masked" else 0
        first = (1, len(encoded(task, predicted)) - 1) if form == "masked" else (0, 1)
        words_at = [(before + a, before + b) for a, b in spans_of(task.tokenizer, TEXT)[1:]]
        maps = [cam[:, a:b, 1:].mean(1) for a, b in [first, *words_at]]
        words = ["[MASK]" if form == "masked" else "[CLS]", *TEXT.split()]
        wanted = score.exp() if form == "masked" else score.sigmoid()
        assert found.probability == pytest.approx(wanted.item(), abs=1e-6)
    by_hand = torch.stack(maps, dim=1).unflatten(-1, (SIDE, SIDE)).detach()
    assert found.words == words
    assert found.maps.shape == (number, len(words), SIDE, SIDE)
    assert by_hand.max() > 0
    torch.testing.assert_close(found.maps, by_hand, rtol=1e-3, atol=1e-4 * by_hand.max().item())


def test_long_texts_and_empty_answers_have_maps_and_unknown_answers_do_not(trained):
    """The list of answers may hold one that VQA's normalisation leaves empty, such as "a"."""
    images = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    task, long = made(trained, "classifier"), "red top left " * 9
    found = task_maps(task, images, long, "red")
    assert found is not None
    assert found.words[:3] == ["[CLS]", "red", "top"]
    assert len(found.words) < 1 + len(long.split())
    with pytest.raises(RunError, match="green"):
        task_maps(task, images, TEXT, "green")
    found = task_maps(made(trained, "masked"), images, TEXT, "")
    assert found is not None
    assert found.maps.isfinite().all()
    assert found.probability is not None
    assert 0 < found.probability < 1


def test_answers_on_which_all_agree_are_labels_as_they_were_written(tmp_path):
    """The metric compares "two" with "two" if all wrote it, and with "2" if they differ."""
    given = [["two"] * 10, ["two"] * 10, ["two"] * 9 + ["three"]]
    answers = [[{"answer": answer, "answer_id": k} for k, answer in enumerate(one)] for one in given]
    samples = [(i, ["how many?"], {"question_id": i, "answers": rows}) for i, rows in enumerate(answers)]
    dataset = write_samples(tmp_path / "d", samples, "test")
    records = [{"sample": i, "answer": answer} for i, answer in enumerate(["two", "two", "2"])]
    verdicts = VisualQuestionAnswering.judge(records, dataset)
    assert [(v.label, v.score) for v in verdicts] == [("two", 100), ("two", 100), ("2", 100)]
    table = Page(confusion(verdicts) or "")
    assert table.rows[1:] == [["two", "2", "0"], ["2", "0", "1"]]
    # "two" is normalised to "2" where annotators differ.
    assert majority(VisualQuestionAnswering, verdicts, records, dataset) == 100
