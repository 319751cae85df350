"""Pairs judged by the fast implementation."""

import pytest
import torch

from mvlm.inference.encode import image_features, match_log_odds, text_features
from support.models import micro_model
from support.scenes import scene


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_judged_pairs_are_those_of_the_plain_network_one_by_one(tokenizer, norm):
    """Images and captions in any order, some of them in several pairs."""
    model = micro_model(dtype=torch.float32, cross_norm=norm).eval()
    pixels = torch.stack([torch.from_numpy(scene(i)[0]).permute(2, 0, 1) for i in range(5)])
    captions = ["red top left on white", "blue", "a square, green bottom right on black, " * 5]
    v, w = image_features(model, pixels, "fp32").v, text_features(model, captions, tokenizer, "fp32").w
    images, texts = torch.tensor([4, 0, 0, 0, 2, 4]), torch.tensor([2, 0, 1, 2, 1, 1])
    found = match_log_odds(model, v, w, images, texts, "fp32")
    rows = int(w.packing.lengths[texts].sum())
    assert torch.equal(match_log_odds(model, v, w, images, texts, "fp32", rows), found)
    with torch.no_grad():
        for image, text, log_odds in zip(images.tolist(), texts.tolist(), found.tolist(), strict=True):
            tokens = torch.from_numpy(tokenizer.encode([captions[text]], 12)[0])
            alone, key_mask = model.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens))
            logits = model.match(model.encode_image(pixels[image : image + 1]), alone, key_mask)[0]
            assert log_odds == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
