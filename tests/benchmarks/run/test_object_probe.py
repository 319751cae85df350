"""The probe for objects on coloured squares, whose place and colour are known."""

from pathlib import Path

import pytest
import torch

from mvlm.inference.encode import eval_loader, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.run.object_probe import accuracy, object_features, patch_features
from mvlm_dataloading import ShardWriter, open_dataset, tokenizer_for
from support.models import micro_config
from support.scenes import png, scene


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """A square of 16 x 16 pixels in one quadrant of each image, and a hidden object that does not count."""
    folder = tmp_path_factory.mktemp("squares") / "data"
    with ShardWriter(folder, name="squares", source="", licence="", attribution="", recipe={}) as writer:
        for split, count in (("train", 64), ("validation", 16)):
            for i in range(count):
                pixels, caption = scene(i if split == "train" else 3 * i + 1)
                box = [16 * ("right" in caption), 16 * ("bottom" in caption), 16, 16]
                square = {"name": "square", "colour": caption.split()[0], "box": box}
                objects = [square, {"name": "ghost", "colour": None, "box": [0, 0, 8, 8], "hidden": True}]
                metadata = {"scene": {"size": [32, 32], "objects": objects}}
                assert writer.add(f"{split}{i:03d}", png(pixels), [caption], metadata, split=split) is None
    return folder


@pytest.fixture(scope="module")
def model(squares) -> TrainedModel:
    torch.manual_seed(0)
    network = MaskVLM(micro_config())
    return TrainedModel(network, tokenizer_for(open_dataset(squares, "train"), network.config.vocab_size), "fp32")


def test_features_are_those_of_the_patch_at_the_centre(model, squares):
    train = open_dataset(squares, "train")
    rows, kinds = object_features(model, train)
    assert len(rows) == len(kinds) == 64
    batch, _ = next(iter(eval_loader(train, model.network, model.tokenizer)))
    v, patch = image_features(model.network, batch.images, "fp32").v, model.network.config.patch_size
    side = 32 // patch
    for i in range(64):
        caption = train.captions(i)[0]
        assert kinds[i] == f"{caption.split()[0]} square"
        column, row = ((16 * (word in caption) + 8) // patch for word in ("right", "bottom"))
        torch.testing.assert_close(rows[i], v[i, 1 + side * row + column])


@pytest.mark.slow
def test_places_can_be_read_behind_the_output_positions_alone(model, squares):
    found = {}
    for added in (False, True):
        torch.manual_seed(0)
        network = MaskVLM(micro_config(output_positions=added))
        probed = TrainedModel(network, model.tokenizer, "fp32")
        train, test = (patch_features(probed, open_dataset(squares, split)) for split in ("train", "validation"))
        assert train[0].shape == (64 * 16, network.config.width)
        assert train[1] == [str(i) for i in range(16)] * 64
        batch, _ = next(iter(eval_loader(open_dataset(squares, "train"), network, probed.tokenizer)))
        torch.testing.assert_close(train[0][16 + 5], image_features(network, batch.images, "fp32").v[1, 1 + 5])
        found[added] = accuracy(train, test)
    assert found[True] > 95 > found[False] + 5


@pytest.mark.slow
def test_colours_can_be_read_and_shuffled_ones_cannot(model, squares):
    train, test = (object_features(model, open_dataset(squares, split)) for split in ("train", "validation"))
    assert accuracy(train, test) == 100
    wrong = test[1][1:] + test[1][:1]
    share = 100 * sum(a == b for a, b in zip(test[1], wrong, strict=True)) / 16
    assert accuracy(train, (test[0], wrong)) == share
    assert accuracy(train, (test[0][:8], ["unknown"] * 4 + test[1][4:8])) == 100
