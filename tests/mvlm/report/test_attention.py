"""Maps of words in a report."""

import base64
import io

import torch
from PIL import Image

from mvlm.evaluation.cross_modal_gain import wrong_partners
from mvlm.inference.trained_model import TrainedModel
from mvlm.report.attention import MOST_WORDS, SIDE, word_maps
from mvlm_dataloading import open_dataset
from support.models import micro_model
from support.scenes import write_scenes


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


def test_captions_are_cut_to_what_the_model_takes(tokenizer, tmp_path):
    data = write_scenes(
        tmp_path / "data", {"train": 4, "test": 4}, captions=lambda i: [f"{i} " + "a long caption " * 9]
    )
    model = TrainedModel(micro_model(dtype=torch.float32, text_length=14), tokenizer, "fp32")
    for pair in word_maps(model, open_dataset(data, "test")):
        for maps in pair:
            assert 1 <= len(maps.caption.split()) < MOST_WORDS
            assert len(tokenizer.encode([maps.caption], 99)[0]) <= 14
