"""Captions by mask-predict, against the same passes over one caption at a time; the loss, against a loop."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.tasks.caption import Captioning, Writer, references
from mvlm.tasks.records import write_predictions
from mvlm.tasks.score import score
from mvlm.tasks.task import TaskOptions
from mvlm_dataloading import DataError, ShardWriter, open_dataset
from support.models import micro_batch, micro_model
from support.questions import write_captions, write_questions
from support.scenes import png, scene

LENGTHS = [4, 1, 6, 3, 5]
OF = [0, 0, 2, 1, 2]


@pytest.fixture(scope="module")
def model():
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
def test_captions_are_those_written_one_at_a_time(model, tokenizer, plan, iterations):
    images = micro_batch()[0].images[:3]
    writer = Writer(model, model.encode_image(images), torch.tensor(OF), torch.tensor(LENGTHS), tokenizer, plan)
    writer.write(iterations)
    likelihoods, odds = writer.mean_log_probability().tolist(), writer.match().tolist()
    for row, (of, length) in enumerate(zip(OF, LENGTHS, strict=True)):
        words, mean = written(model, tokenizer, images[of], length, iterations)
        assert writer.words[row, :length].tolist() == words
        assert likelihoods[row] == pytest.approx(mean, rel=1e-9)
        tokens = torch.tensor([tokenizer.cls_id, *words, tokenizer.sep_id])
        w, mask = model.encode_text(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
        no, yes = model.match(model.encode_image(images[of : of + 1]), w, mask)[0].tolist()
        assert odds[row] == pytest.approx(yes - no, rel=1e-9)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("choose_by", ["itm", "likelihood"])
def test_the_best_of_the_likeliest_lengths_is_chosen(model, tokenizer, choose_by):
    task = (
        Captioning(copy.deepcopy(model), TaskOptions(lengths=3, iterations=2, choose_by=choose_by), {}).double().eval()
    )
    task.set_tokenizer(tokenizer)
    task.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch, _ = micro_batch()
    found = task.predict(batch, "fast")
    v = task.model.encode_image(batch.images)
    for row, record in enumerate(found):
        lengths = np.argsort(-task.head(v[row, 0]).numpy())[:3] + 1
        writer = Writer(task.model, v, torch.tensor([row] * 3), torch.from_numpy(lengths), tokenizer, "plain")
        writer.write(2)
        best = int((writer.match() if choose_by == "itm" else writer.mean_log_probability()).argmax())
        assert record == {"caption": tokenizer.decode(writer.words[best, : lengths[best]].tolist())}
    # The captions of the batch are not read.
    other = replace(batch, tokens=torch.where(batch.tokens > 4, 5, batch.tokens))
    assert task.predict(other, "fast") == found


@torch.no_grad()
def test_by_default_itm_chooses_no_caption(model, tokenizer):
    """Fine-tuning does not train ITM's head."""
    task = Captioning(copy.deepcopy(model), TaskOptions(lengths=3, iterations=2), {}).double().eval()
    task.set_tokenizer(tokenizer)
    batch, _ = micro_batch()
    found = task.predict(batch, "fast")
    task.model.matching_head.weight.neg_()
    assert task.predict(batch, "fast") == found


def test_the_loss_is_the_mean_over_captions(model):
    """Of each caption's own mean over its masked tokens, and of its length, given the image alone."""
    task = Captioning(copy.deepcopy(model), TaskOptions(), {}).double()
    with torch.no_grad():
        task.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch, masks = micro_batch()
    found = task.losses_of_step(batch, masks, [], "fast")
    wanted = 0.0
    for row in range(5):
        start, stop = batch.cu_seqlens[row : row + 2].tolist()
        own = masks.token_ids[(masks.token_ids >= start) & (masks.token_ids < stop)]
        hidden = batch.tokens.clone()
        hidden[own] = model.config.mask_token_id
        bounds = torch.tensor([0, stop - start], dtype=torch.int32)
        v = model.encode_image(batch.images[row : row + 1])
        w, mask = model.encode_text(hidden[start:stop], bounds, stop - start)
        with torch.no_grad():
            log_p = model.language_head(model.text_cross(w, v, mask, None))[0].log_softmax(-1)
            lengths = task.head(v[0, 0]).log_softmax(-1)
        wanted -= float(log_p[own - start, batch.tokens[own]].mean() + lengths[stop - start - 3]) / 5
    assert found.total.item() == pytest.approx(wanted, rel=1e-9)


def test_figures_of_captions(tmp_path):
    dataset = open_dataset(write_captions(tmp_path / "d", {"train": 4}), "train")
    captions = [dataset.captions(i)[0] for i in range(4)]
    found = Captioning.score([{"caption": text} for text in [*captions[:3], captions[0]]], dataset)
    assert (found["equal"], found["captions"]) == (75, 4)
    low, high = found["cider_d_95"]
    assert low < found["cider_d"] < high <= 1000
    assert 50 < found["bleu_4"] < 100


def test_other_data_and_a_model_without_its_only_input_are_refused(tmp_path):
    dataset = open_dataset(write_questions(tmp_path / "q"), "train")
    with pytest.raises(DataError, match="found the field question_id; is it data of another task"):
        Captioning.make_state(dataset, TaskOptions())
    with pytest.raises(ConfigError, match="a caption is written from the image alone"):
        Captioning.make_state(dataset, TaskOptions(blind="text"))


def test_references_are_those_of_all_samples_of_the_image(tmp_path):
    """Data with a row for each caption; a sample without `image_id` has its own captions."""
    with ShardWriter(tmp_path / "data", name="x", source="", licence="", attribution="", recipe={}) as writer:
        for row, (image, text) in enumerate([(1, "a cat"), (2, "a dog"), (1, "a pet"), (1, "a cat"), (None, "a car")]):
            metadata = {} if image is None else {"image_id": image}
            writer.add(str(row), png(scene(image or 0)[0]), [text], metadata, split="test")
    found = references(open_dataset(tmp_path / "data", "test"))
    assert found == [["a cat", "a pet"], ["a dog"], ["a cat", "a pet"], ["a cat", "a pet"], ["a car"]]


COCO = [
    ["a red square on white", "a red box", "the box is red"],
    ["a blue square on white", "a blue thing"],
    ["a dog sits on the grass", "one dog", "a brown dog sits still", "the dog sits"],
    ["a cat"],
]
WRITTEN = ["a red square on grass", "a blue square on white", "a brown dog on the grass", "a small cat"]


@pytest.mark.parametrize("image_id", ["coco {}", "own {}", "{}"])
def test_data_with_a_row_for_each_caption_have_the_figures_of_a_row_for_each_image(tmp_path, image_id):
    """Of the record, of the written predictions, and of the report's verdicts. Copies of an image are one image."""
    names = [image_id.format(7 * i + 3) for i in range(len(COCO))]
    rows = {
        "images": [(i, texts) for i, texts in enumerate(COCO)],
        "captions": [(i, [COCO[i][k]]) for k in range(4) for i in range(len(COCO)) if k < len(COCO[i])],
    }
    annotations = [
        {"image_id": int(name) if (name := names[i].removeprefix("coco ")).isdigit() else name, "caption": text}
        for i, texts in enumerate(COCO)
        for text in texts
    ]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": annotations}))
    figures, scores, verdicts = {}, {}, {}
    for form, samples in rows.items():
        with ShardWriter(tmp_path / form, name="x", source="", licence="", attribution="", recipe={}) as writer:
            for row, (i, texts) in enumerate(samples):
                assert writer.add(f"{row:02}", png(scene(i)[0]), texts, {"image_id": names[i]}, split="test") is None
        dataset = open_dataset(tmp_path / form, "test")
        records = [{"sample": row, "caption": WRITTEN[i]} for row, (i, _) in enumerate(samples)]
        figures[form] = Captioning.score(records, dataset)
        metadata = [dataset.metadata(row) for row in range(len(dataset))]
        write_predictions(tmp_path / f"{form}.json", "caption", records, metadata)
        scores[form] = score("caption", tmp_path / f"{form}.json", tmp_path / "references.json")
        verdicts[form] = [(v.sample, v.predicted, v.score, v.right) for v in Captioning.judge(records, dataset)]
    assert figures["captions"]["captions"] == 4
    assert figures["captions"] == figures["images"]
    assert scores["captions"] == scores["images"]
    assert {name: figures["captions"][name] for name in ("cider_d", "cider_d_95", "bleu_4")} == {
        name: pytest.approx(scores["captions"][name]) for name in ("cider_d", "cider_d_95", "bleu_4")
    }
    assert verdicts["captions"] == verdicts["images"]
    assert np.mean([value for _, _, value, _ in verdicts["captions"]]) == pytest.approx(figures["captions"]["cider_d"])


@pytest.mark.parametrize("image_id", [None, ""])
def test_samples_without_an_image_id_are_images_of_their_own(tmp_path, image_id):
    """Also where the field is there and empty: their interval has a width, and each has its own prediction."""
    data, figures = {"absent": {}, "empty": {"image_id": image_id}}, {}
    for form, metadata in data.items():
        with ShardWriter(tmp_path / form, name="x", source="", licence="", attribution="", recipe={}) as writer:
            for i, texts in enumerate(COCO):
                assert writer.add(str(i), png(scene(i)[0]), texts, metadata, split="test") is None
        dataset = open_dataset(tmp_path / form, "test")
        records = [{"sample": i, "caption": text} for i, text in enumerate(WRITTEN)]
        figures[form] = Captioning.score(records, dataset)
        write_predictions(tmp_path / f"{form}.json", "caption", records, [dataset.metadata(i) for i in range(4)])
        rows = json.loads((tmp_path / f"{form}.json").read_text())
        assert [row["image_id"] for row in rows] == [0, 1, 2, 3]
    assert figures["empty"] == figures["absent"]
    low, high = figures["empty"]["cider_d_95"]
    assert low < figures["empty"]["cider_d"] < high
