"""Grounding by GradCAM on coloured squares, against the maps of single images and boxes counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvlm.inference.images import load_image
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.load import load_model
from mvlm.tasks.grounding import evaluate_grounding, other_phrases, phrase_maps, phrases_of
from mvlm_dataloading import DataError, open_dataset
from support.questions import write_phrases
from support.scenes import scene, write_samples


@pytest.fixture(scope="module")
def phrases(tmp_path_factory) -> Path:
    counts = {"train": 4, "validation": 8, "test": 8}
    return write_phrases(tmp_path_factory.mktemp("phrases") / "data", counts)


@pytest.mark.slow
def test_maps_of_a_batch_are_those_of_single_images(trained):
    """Padding has no effect, and the last layer's map is [CLS]'s of `TrainedModel.attention` over the tokens."""
    model = load_model(trained, "cpu")
    pixels, texts = zip(*(scene(number) for number in (1, 6, 19)), strict=True)
    texts = [text[: 4 + 6 * i] for i, text in enumerate(texts)]  # of different lengths
    images = torch.stack([load_image(image, 32) for image in pixels])
    maps = phrase_maps(model.network, model.tokenizer, images, list(texts))  # (A, B, rows, columns)
    for i, text in enumerate(texts):
        alone = phrase_maps(model.network, model.tokenizer, images[i : i + 1], [text])
        torch.testing.assert_close(maps[:, i], alone[:, 0], rtol=1e-4, atol=1e-9)
        found = model.attention(pixels[i], text)
        tokens = len(model.tokenizer.encode([text], 12)[0])  # in the last layer no token but [CLS] has an effect
        torch.testing.assert_close(maps[-1, i], found.gradcam[-1, 0] / tokens, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_the_point_is_the_highest_of_the_resized_map_and_the_layer_the_best_on_validation(trained, phrases):
    model, test, validation = (
        load_model(trained, "cpu"),
        open_dataset(phrases, "test"),
        open_dataset(phrases, "validation"),
    )
    figures, records = evaluate_grounding(model, test, validation)
    layer = figures["layer"]
    assert figures["validation_by_layer"][layer] == max(figures["validation_by_layer"])
    known = phrases_of(test)
    right = []
    for i, record in enumerate(records):
        image = torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)
        heat = phrase_maps(model.network, model.tokenizer, image[None], [known.texts[i]])[layer]
        heat = F.interpolate(heat[None], size=(32, 32), mode="bicubic", align_corners=False)[0, 0].numpy()
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        assert (record["x"], record["y"]) == (x + 0.5, y + 0.5)
        left, top, width, height = known.boxes[i]
        right.append(left <= x < left + width and top <= y < top + height)
    assert figures["accuracy"] == 100 * np.mean(right)
    assert figures["chance"] == 25
    assert evaluate_grounding(model, test, None, layer)[1] == records
    torch.manual_seed(0)
    random = TrainedModel(MaskVLM(model.network.config), model.tokenizer)
    with torch.no_grad():
        random.network.matching_head.bias.add_(1)  # a head that a step has moved; a constant changes no map
    figures, _ = evaluate_grounding(random, test, None, 0)
    assert (figures["accuracy"], figures["accuracy_95"]) == (figures["untrained"], figures["untrained_95"])
    assert figures["above_untrained_95"] == [0, 0]  # paired: no difference on any phrase


def test_wrong_phrases_are_other_phrases():
    texts = ["a", "b", "a", "a", "c"]
    others = other_phrases(texts)
    assert all(one != other for one, other in zip(texts, others, strict=True))
    assert set(others) <= set(texts)
    assert other_phrases(["a", "a"]) == ["a", "a"]


@pytest.mark.slow
def test_two_ranks_have_the_figures_and_records_of_one_which_the_scorer_reads(
    trained, tmp_path, run_mvlm, on_two_ranks
):
    data = write_phrases(tmp_path / "data", {"validation": 8, "test": 150})  # three batches
    words = ["eval", "grounding", "--checkpoint", trained, "--data", data, "--device", "cpu", "--out"]
    assert run_mvlm(*words, tmp_path / "one.json").code == 0
    codes, errors = on_two_ranks(*words, tmp_path / "two.json")
    assert codes == [0, 0], errors
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    assert len(two["records"]) == 150
    assert not list(tmp_path.glob("*.parts"))
    test = open_dataset(data, "test")
    (tmp_path / "points.jsonl").write_text("\n".join(json.dumps(record) for record in one["records"]))
    (tmp_path / "truth.jsonl").write_text("\n".join(json.dumps(test.metadata(i)) for i in range(len(test))))
    for predictions in (tmp_path / "points.jsonl", tmp_path / "one.json"):
        scored = run_mvlm("score", "grounding", predictions, tmp_path / "truth.jsonl")
        assert json.loads("\n".join(scored.out))["accuracy"] == one["accuracy"]
    made_by = {"model": load_model(trained, "cpu").sha256, "fingerprint": test.fingerprint, "precision": "fp32"}
    assert {name: one[name] for name in made_by} == made_by


def test_boxes_of_texts_are_refused_and_sizes_may_be_written_with_a_point(tmp_path):
    facts = {"size": [96.0, 64.0], "image_id": ""}
    bad, good = (
        write_samples(tmp_path / str(box[0]), [(i, ["a red square"], facts | {"box": box}) for i in range(2)])
        for box in (["1", "2", "3", "4"], [1.5, 2.0, 3.0, 4.0])
    )
    with pytest.raises(DataError, match="key 00: wanted `box`"):
        phrases_of(bad)
    found = phrases_of(good)
    assert (found.sizes[0], {type(length) for length in found.sizes[0]}) == ([96, 64], {int})
    assert len(set(found.images)) == 2  # an empty `image_id` is none


@pytest.mark.slow
def test_other_data_layers_and_models_are_refused(trained, without_itm, scenes, phrases, tmp_path, run_mvlm):
    for run, data, layer, message in (
        (trained, scenes, 0, "wanted `box`"),
        (trained, phrases, 2, "layer: wanted 0 to 1, got 2"),
        (without_itm, phrases, 0, "checkpoint: wanted a model trained with ITM"),
    ):
        words = ("--checkpoint", run, "--data", data, "--device", "cpu", "--layer", layer, "--out", tmp_path / "a")
        outcome = run_mvlm("eval", "grounding", *words)
        assert (outcome.code, message in outcome.err[-1]) == (2, True), outcome.err
    assert not list(tmp_path.iterdir())
