"""Captions by mask-predict, against the same passes over one caption at a time; the loss, against a loop."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.caption import Captioning, Writer
from mvlm.tasks.score import score, write_predictions
from mvlm.tasks.task import TaskOptions
from support.models import micro_batch, micro_model
from support.scenes import write_samples

LENGTHS = [4, 1, 6, 3, 5]
OF = [0, 0, 2, 1, 2]


COCO = [
    ["a red square on white", "a red box", "the box is red"],
    ["a blue square on white", "a blue thing"],
    ["a dog sits on the grass", "one dog", "a brown dog sits still", "the dog sits"],
    ["a cat"],
]
WRITTEN = ["a red square on grass", "a blue square on white", "a brown dog on the grass", "a small cat"]


@pytest.fixture(scope="module")
def network():
    return micro_model()


@torch.no_grad()
def word_log_p(model, tokenizer, image, words: list[int]) -> np.ndarray:
    """Log-probabilities (words, V) of ordinary tokens at each place of one caption."""
    tokens = torch.tensor([tokenizer.cls_id, *words, tokenizer.sep_id])
    w, mask = model.encode_text(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    logits = model.language_head(model.text_cross(w, model.encode_image(image[None]), mask, None))[0, 1:-1].numpy()
    logits = logits[:, : tokenizer.vocab_size].copy()
    logits[:, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id]] = -np.inf
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def written(model, tokenizer, image, length: int, iterations: int) -> tuple[list[int], float]:
    """Words of one caption and their mean log-probability, by the definition of mask-predict."""
    words, sure = [tokenizer.mask_id] * length, np.zeros(length)
    for done in range(iterations):
        again = list(range(length))
        if done:
            again = np.argsort(sure, kind="stable")[: length * (iterations - done) // iterations].tolist()
        for place in again:
            words[place] = tokenizer.mask_id
        log_p = word_log_p(model, tokenizer, image, words)
        for place in again:
            words[place], sure[place] = int(log_p[place].argmax()), log_p[place].max()
    return words, float(sure.mean())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize("iterations", [1, 4])
def test_captions_are_those_written_one_at_a_time(network, tokenizer, plan, iterations):
    images = micro_batch()[0].images[:3]
    writer = Writer(
        network, network.encode_image(images), torch.tensor(OF), torch.tensor(LENGTHS), tokenizer, IMPLEMENTATIONS[plan]
    )
    writer.write(iterations)
    likelihoods, odds = writer.mean_log_probability().tolist(), writer.match().tolist()
    for row, (of, length) in enumerate(zip(OF, LENGTHS, strict=True)):
        words, mean = written(network, tokenizer, images[of], length, iterations)
        assert writer.words[row, :length].tolist() == words
        assert likelihoods[row] == pytest.approx(mean, rel=1e-9)
        tokens = torch.tensor([tokenizer.cls_id, *words, tokenizer.sep_id])
        w, mask = network.encode_text(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
        no, yes = network.matching_logits(*network.fuse(network.encode_image(images[of : of + 1]), w, mask))[0].tolist()
        assert odds[row] == pytest.approx(yes - no, rel=1e-9)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("choose_by", ["itm", "likelihood"])
def test_the_best_of_the_likeliest_lengths_is_chosen(network, tokenizer, choose_by):
    task = (
        Captioning(copy.deepcopy(network), TaskOptions(lengths=3, iterations=2, choose_by=choose_by), {})
        .double()
        .eval()
    )
    task.set_tokenizer(tokenizer)
    task.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch, _ = micro_batch()
    found = task.predict(batch, IMPLEMENTATIONS["fast"])
    v = task.model.encode_image(batch.images)
    for row, record in enumerate(found):
        lengths = np.argsort(-task.head(v[row, 0]).numpy())[:3] + 1
        writer = Writer(
            task.model, v, torch.tensor([row] * 3), torch.from_numpy(lengths), tokenizer, IMPLEMENTATIONS["plain"]
        )
        writer.write(2)
        best = int((writer.match() if choose_by == "itm" else writer.mean_log_probability()).argmax())
        assert record == {"caption": tokenizer.decode(writer.words[best, : lengths[best]].tolist())}
    if choose_by == "likelihood":  # ITM's head, which fine-tuning does not train, has no say
        task.model.matching_head.weight.neg_()
        assert task.predict(batch, IMPLEMENTATIONS["fast"]) == found
    # The captions of the batch are not read.
    other = replace(batch, tokens=torch.where(batch.tokens > 4, 5, batch.tokens))
    assert task.predict(other, IMPLEMENTATIONS["fast"]) == found


def test_the_loss_is_the_mean_over_captions(network):
    """The mean is that of each caption's mean over its masked tokens, and of its length, given the image alone."""
    task = Captioning(copy.deepcopy(network), TaskOptions(), {}).double()
    with torch.no_grad():
        task.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch, masks = micro_batch()
    found = task.losses_of_step(batch, masks, [], IMPLEMENTATIONS["fast"])
    wanted = 0.0
    for row in range(5):
        start, stop = batch.cu_seqlens[row : row + 2].tolist()
        own = masks.token_ids[(masks.token_ids >= start) & (masks.token_ids < stop)]
        hidden = batch.tokens.clone()
        hidden[own] = network.config.mask_token_id
        bounds = torch.tensor([0, stop - start], dtype=torch.int32)
        v = network.encode_image(batch.images[row : row + 1])
        w, mask = network.encode_text(hidden[start:stop], bounds, stop - start)
        with torch.no_grad():
            log_p = network.language_head(network.text_cross(w, v, mask, None))[0].log_softmax(-1)
            lengths = task.head(v[0, 0]).log_softmax(-1)
        wanted -= float(log_p[own - start, batch.tokens[own]].mean() + lengths[stop - start - 3]) / 5
    assert found.total.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("image_id", ["coco {}", "own {}", "{}"])
def test_a_row_for_each_caption_has_the_figures_of_a_row_for_each_image(tmp_path, image_id):
    """The record, the written predictions and the report's verdicts are equal. Copies of an image are one image."""
    names = [image_id.format(7 * i + 3) for i in range(len(COCO))]
    rows = {
        "images": [(i, texts, {"image_id": names[i]}) for i, texts in enumerate(COCO)],
        "captions": [(i, [COCO[i][k]], {"image_id": names[i]}) for k in range(4) for i in range(4) if k < len(COCO[i])],
    }
    ids = [int(name) if (name := found.removeprefix("coco ")).isdigit() else name for found in names]
    annotations = [{"image_id": ids[i], "caption": text} for i, texts in enumerate(COCO) for text in texts]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
    found = {}
    for form, samples in rows.items():
        dataset = write_samples(tmp_path / form, samples, "test")
        records = [{"sample": row, "caption": WRITTEN[i]} for row, (i, _, _) in enumerate(samples)]
        metadata = [dataset.metadata(row) for row in range(len(dataset))]
        write_predictions(tmp_path / f"{form}.json", "caption", records, metadata)
        verdicts = [(v.sample, v.predicted, v.score, v.right) for v in Captioning.judge(records, dataset)]
        scored = score("caption", tmp_path / f"{form}.json", tmp_path / "references.json")
        found[form] = Captioning.score(records, dataset), scored, verdicts
    assert found["captions"] == found["images"]
    figures, scored, verdicts = found["images"]
    assert (figures["captions"], figures["equal"]) == (4, 25)
    for name in ("cider_d", "cider_d_95", "bleu_4"):
        assert figures[name] == pytest.approx(scored[name])
    assert np.mean([value for _, _, value, _ in verdicts]) == pytest.approx(figures["cider_d"])
    low, high = figures["cider_d_95"]
    assert low < figures["cider_d"] < high
