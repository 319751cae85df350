"""Zero-shot recognition and probes on coloured squares, whose class is the colour."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.load import load_model
from mvlm.tasks.recognition import evaluate as evaluation
from mvlm.tasks.recognition.classes import class_names, labels_of, read_templates
from mvlm.tasks.recognition.evaluate import RecognitionOptions, evaluate_recognition, needed_splits
from mvlm_dataloading import DataError, open_dataset
from support.commands import assert_refused
from support.questions import write_phrases


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_phrases(tmp_path_factory.mktemp("squares") / "data", {"train": 32, "validation": 8, "test": 16})


@pytest.mark.slow
def test_zero_shot_is_the_nearest_mean_of_templates(trained, squares, tmp_path):
    """Against embeddings averaged by hand: each template's of unit length, and their mean again."""
    (tmp_path / "templates.txt").write_text("{c} on white\n\n{} top left\n")
    model, test = load_model(trained, "cpu"), open_dataset(squares, "test")
    options = RecognitionOptions(templates=tmp_path / "templates.txt")
    figures, records = evaluate_recognition(model, {"test": test}, "test", options)
    names, images = ["blue", "green", "red", "yellow"], model.embed_images(test).numpy()
    classes = []
    for name in names:
        texts = [model.embed_texts([text]).numpy()[0] for text in (f"{name} on white", f"{name} top left")]
        mean = sum(text / np.linalg.norm(text) for text in texts) / 2
        classes.append(mean / np.linalg.norm(mean))
    wanted = [names[i] for i in (images @ np.stack(classes).T).argmax(1)]
    truth = [test.metadata(i)["label"] for i in range(16)]
    assert [record["label"] for record in records] == wanted
    assert figures["accuracy"] == 100 * np.mean([a == b for a, b in zip(wanted, truth, strict=True)])
    assert figures["baselines"]["chance"] == figures["baselines"]["majority"] == 25
    assert figures["top5"] == 100
    assert (figures["classes"], figures["templates"]) == (4, 2)
    assert (figures["model"], figures["fingerprint"]) == (model.sha256, test.fingerprint)
    assert figures["precision"] in ("bf16", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_model_that_tells_no_class_from_another_recognises_none(trained, squares, tmp_path, monkeypatch, value):
    """All texts have one embedding. The records say what the figures do."""
    model, test = load_model(trained, "cpu"), open_dataset(squares, "test")
    file = tmp_path / "names.txt"
    file.write_text("red\nblue\ngreen\nyellow\npink\ngrey\n")
    width = model.network.config.itc_width
    monkeypatch.setattr(evaluation, "label_embeddings", lambda _, names, __: torch.full((len(names), width), value))
    figures, records = evaluate_recognition(model, {"test": test}, "test", RecognitionOptions(classes=file))
    assert figures["accuracy"] == figures["top5"] == figures["baselines"]["untrained"] == 0
    assert all(record["label"] != test.metadata(i)["label"] for i, record in enumerate(records))


@pytest.mark.slow
def test_probes_learn_colours_from_frozen_features(trained, squares, tmp_path, run_mvlm):
    words = ("--checkpoint", trained, "--data", squares, "--device", "cpu", "--probe", "--shots", 2, "--seeds", 2)
    assert run_mvlm("eval", "recognition", *words, "--out", tmp_path / "out.json").code == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["probe"]["accuracy"] == 100  # colours are on the surface of the features
    assert set(figures["few_shot"]) == {"2"}
    low, high = figures["few_shot"]["2"]["accuracy_95"]
    assert low <= figures["few_shot"]["2"]["accuracy"] <= high
    assert [record["probe"] for record in figures["records"]] == [
        open_dataset(squares, "test").metadata(i)["label"] for i in range(16)
    ]


def test_classes_and_templates_that_do_not_fit_are_refused(squares, tmp_path):
    test = open_dataset(squares, "test")
    labels = labels_of(test, None)
    assert labels_of(test, "group") == [test.metadata(i)["group"] for i in range(16)]
    with pytest.raises(DataError, match="wanted a class in the field 'base' of the metadata, found None; name another"):
        labels_of(test, "concept")
    file = tmp_path / "names.txt"
    file.write_text("red\nblue\n")
    with pytest.raises(
        DataError, match=r"wanted a line for each class of the split, found none for 'green' \(2 missing"
    ):
        class_names(labels, file)
    file.write_text("red\nblue\ngreen\nyellow\npink\n")
    assert class_names(labels, file) == ["red", "blue", "green", "yellow", "pink"]
    with pytest.raises(ConfigError, match=r"names.txt, line 1: wanted .* for the class, found 'red'"):
        read_templates(file)
    with pytest.raises(ConfigError, match="wanted a text file, could not read it"):
        read_templates(tmp_path / "none.txt")


def test_shots_beyond_the_rarest_class_and_unknown_classes_are_refused(trained, squares, tmp_path, run_mvlm):
    words = ("eval", "recognition", "--checkpoint", trained, "--data", squares, "--out", tmp_path / "out.json")
    refused = run_mvlm(*words, "--probe", "--shots", 9, "--device", "cpu")
    assert_refused(refused, "shots, seeds: wanted 1 to 8 images a class, the fewest in train, and 2 to 20 seeds")
    refused = run_mvlm(*words, "--probe", "--by", "id", "--device", "cpu")
    assert_refused(refused, "wanted every class of the validation split in train, found none of")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_probe_is_not_scored_on_images_that_it_is_fitted_to(trained, squares, run_mvlm, split):
    words = ("--checkpoint", trained, "--data", squares, "--split", split, "--device", "cpu")
    refused = run_mvlm("eval", "recognition", *words, "--probe")
    assert refused.code == 2
    assert f"probe: wanted a split to which no probe is fitted, such as test, got {split}" in refused.err[-1]


def test_the_splits_of_a_probe_have_a_fixed_order():
    """They are part of the plan by which an evaluation is continued."""
    assert needed_splits("test", True) == ("test", "train", "validation")
    assert needed_splits("train", False) == ("train",)


def test_a_probe_without_training_images_is_refused(trained, squares):
    model = TrainedModel(*load_model(trained), "fp32")
    options = RecognitionOptions(probe=True)
    with pytest.raises(ConfigError, match="wanted the splits test, train, validation, found none named train"):
        evaluate_recognition(model, {"test": open_dataset(squares, "test")}, "test", options)


@pytest.mark.slow
def test_untrained_figures_do_not_depend_on_the_random_state(trained, squares):
    model, test = load_model(trained, "cpu"), open_dataset(squares, "test")
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluate_recognition(model, {"test": test}, "test")[0])
    assert found[0] == found[1]
