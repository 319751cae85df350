"""Statements about strips of images: the order of the images matters, and other data are refused."""

import dataclasses

import pytest
import torch

from mvlm.inference.encode import eval_loader
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.load import load_model
from mvlm.tasks.pairs import Pairs
from mvlm.tasks.task import TaskOptions
from mvlm_dataloading import DataError, open_dataset
from support.questions import write_statements
from support.scenes import write_samples

STATE = {"labels": ["false", "true"], "images": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_statements(tmp_path_factory.mktemp("statements") / "data")


def write(folder, records):
    return write_samples(folder, [(i, ["the left is red"], record) for i, record in enumerate(records)])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_features_are_those_of_each_image_in_order(trained, data, plan):
    """Each image's features are those that it has alone with the text. Swapped images swap them."""
    loaded = load_model(trained)
    model, tokenizer = loaded.network, loaded.tokenizer
    task = Pairs(model.eval(), TaskOptions(), STATE)
    batch, _ = next(iter(eval_loader(open_dataset(data, "train"), model, tokenizer, **task.loader_options())))
    features = task.fuse(batch, IMPLEMENTATIONS[plan], images=2)
    left, right = batch.images.chunk(2, dim=3)
    alone = [task.fuse(dataclasses.replace(batch, images=images), IMPLEMENTATIONS[plan]) for images in (left, right)]
    torch.testing.assert_close(features, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    swapped = task.fuse(dataclasses.replace(batch, images=torch.cat([right, left], 3)), IMPLEMENTATIONS[plan], images=2)
    torch.testing.assert_close(swapped, torch.cat(alone[::-1], 1), rtol=1e-4, atol=1e-5)


def test_figures_of_statements(data):
    """Each sentence of 16 statements on 4 sets has two pairs. Always true is right once a sentence."""
    dataset = open_dataset(data, "test")
    found = Pairs.score([{"label": "true"}] * 16, dataset)
    assert (found["accuracy"], found["consistency"], found["majority"]) == (50, 0, 50)
    assert found["accuracy_95"] == [50, 50]  # bootstrapped over sets of images, of which each is half right
    truth = [{"label": record["label"]} for record in Pairs.labelled(dataset)]
    assert Pairs.score(truth, dataset)["consistency"] == 100


GOOD = {"identifier": "train-1-0-0", "label": "True", "images": 2}


@pytest.mark.parametrize(
    "records, message",
    [
        ([GOOD, {**GOOD, "identifier": "train-1-0-1", "images": 3}], "wanted 2 images .* found 3"),
        ([{**GOOD, "identifier": "q0"}], "identifier 'q0'"),
        ([{**GOOD, "label": "neutral"}], "'neutral'"),
        ([{"identifier": "train-1-0-0", "label": "True"}], "`images`"),
        ([GOOD, GOOD], "twice"),
    ],
)
def test_other_data_are_refused(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        Pairs.labelled(write(tmp_path / "data", records))


@pytest.mark.slow
def test_other_image_counts_label_orders_and_augmentations_are_refused(trained, data, tmp_path, run_mvlm):
    model = load_model(trained).network
    with pytest.raises(DataError, match="labels"):
        Pairs(model, TaskOptions(), {"labels": ["true", "false"], "images": 2})
    three, dataset = STATE | {"images": 3}, write(tmp_path / "data", [GOOD])
    for call in (Pairs(model, TaskOptions(), three).targets, lambda split: Pairs.check_references(split, three)):
        with pytest.raises(DataError, match=r"wanted 3 images .* found 2"):
            call(dataset)
    words = ["--checkpoint", trained, "--data", data, "--out", tmp_path / "run", "--device", "cpu", "--batch-size", 8]
    outcome = run_mvlm("finetune", "pairs", *words, "--flip", 0.5, "--randaugment", 2)
    assert (outcome.code, "--flip 0.5, --randaugment 2" in outcome.err[-1]) == (2, True)
