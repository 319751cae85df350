"""Maps of words in a report, and the pointing game."""

import base64
import io
import json

import pytest
import torch
from PIL import Image

from mvlm.errors import RunError
from mvlm.evaluation.cross_modal_gain import wrong_partners
from mvlm.inference.trained_model import TrainedModel
from mvlm.report.attention import MOST_WORDS, SIDE, pointing_game, word_maps
from mvlm_dataloading import open_dataset
from support.models import micro_model
from support.pages import POINTING_GAME
from support.scenes import write_scenes


@pytest.mark.slow
def test_each_image_has_maps_of_its_own_caption_and_of_a_wrong_one(tokenizer, heldout_split):
    model = TrainedModel(micro_model(dtype=torch.float32, text_length=40), tokenizer, "fp32")
    found = word_maps(model, heldout_split)
    partner = wrong_partners(len(heldout_split))
    captions = [heldout_split.captions(i)[0] for i in range(len(heldout_split))]
    assert len(found) == 4
    for own, wrong in found:
        i = captions.index(own.caption)
        assert wrong.caption == captions[int(partner[i])]
        for maps in (own, wrong):
            match = model.match(heldout_split.image_bytes(i), maps.caption)
            assert abs(match.log_odds.item() - maps.log_odds) < 1e-4
            with Image.open(io.BytesIO(base64.b64decode(maps.panels.partition(",")[2]))) as panels:
                assert panels.width == SIDE * (2 + len(maps.caption.split()))  # the image, [CLS] and the words


@pytest.mark.slow
def test_captions_are_cut_to_what_the_model_takes(tokenizer, tmp_path):
    data = write_scenes(
        tmp_path / "data", {"train": 4, "test": 4}, captions=lambda i: [f"{i} " + "a long caption " * 9]
    )
    model = TrainedModel(micro_model(dtype=torch.float32, text_length=14), tokenizer, "fp32")
    unbroken = write_scenes(tmp_path / "unbroken", {"train": 4, "test": 4}, captions=lambda i: ["https:" + "/a" * 40])
    for pair in word_maps(model, open_dataset(unbroken, "test")):
        assert all(len(maps.caption) > 3 and "https:/a".startswith(maps.caption[:8]) for maps in pair)
    for pair in word_maps(model, open_dataset(data, "test")):
        for maps in pair:
            assert 1 <= len(maps.caption.split()) < MOST_WORDS
            assert len(tokenizer.encode([maps.caption], 99)[0]) <= 14


@pytest.mark.parametrize(
    "difference, verdict",
    [
        ([2.0, 9.04], "points better than the untrained one (95 % interval of the difference +2.0 to +9.0 points)"),
        ([-1.0, 2.0], "does not point better than the untrained one"),
        ([0.0, 2.0], "does not point better than the untrained one"),
        ([-5.0, -2.0], "points worse than the untrained one"),
    ],
)
def test_the_pointing_game_stands_beside_its_baselines_and_says_what_it_shows(tmp_path, difference, verdict):
    file = tmp_path / "grounding.json"
    assert pointing_game(file, "own") is None
    file.write_text(json.dumps(POINTING_GAME | {"above_untrained_95": difference}))
    found = pointing_game(file, "own")
    assert found is not None
    assert found.source == "7 phrases of phrases, test; checkpoint runs/a"
    assert [(row[1], row[2]) for row in found.rows] == [
        ("31.2", "28.0 to 34.5"), ("30.0", ""), ("12.5", "10.0 to 15.0"), ("4.0", ""), ("10.0", ""),
    ]  # fmt: skip
    assert verdict in found.verdict


@pytest.mark.parametrize("named, stale", [({}, False), ({"model": "own"}, False), ({"model": "another's"}, True)])
def test_a_pointing_game_of_another_model_is_known(tmp_path, named, stale):
    file = tmp_path / "grounding.json"  # of an earlier version if it names no model
    file.write_text(json.dumps(POINTING_GAME | {"above_untrained_95": [1, 2]} | named))
    found = pointing_game(file, "own")
    assert found is not None
    assert found.stale == stale


@pytest.mark.parametrize("text", ["{}", "", "[1]", json.dumps(POINTING_GAME)])
def test_another_file_in_place_of_the_pointing_game_is_refused(tmp_path, text):
    (tmp_path / "grounding.json").write_text(text)
    with pytest.raises(RunError, match=r"grounding.json: wanted the figures that `mvlm eval grounding` writes, got "):
        pointing_game(tmp_path / "grounding.json", "own")
