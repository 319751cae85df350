"""Predictions of masked patches and tokens depend on what is visible, and on nothing that is masked."""

from dataclasses import replace

import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import losses as objectives
from mvlm_dataloading import Batch, Masks
from support.models import micro_batch, micro_model


@pytest.fixture
def predictions(monkeypatch):
    """Function that runs a model on a batch and returns the inputs of its two reconstruction losses."""

    def run(model: MaskVLM, batch: Batch, masks: Masks) -> dict[str, torch.Tensor]:
        found = {}

        def language(logits, targets, weights=None):
            found["logits"], found["tokens"] = logits.detach(), targets
            return logits.sum() * 0

        def image(pred, target, weights=None):
            found["pixels"], found["target"] = pred.detach(), target
            return pred.sum() * 0

        with monkeypatch.context() as patch:
            patch.setattr(objectives, "masked_language_loss", language)
            patch.setattr(objectives, "masked_image_loss", image)
            model(batch, masks, weights=objectives.LossWeights(itc=0, itm=0))
        return found

    return run


def change_pixels(batch: Batch, masks: Masks, *, masked: bool) -> Batch:
    """Change pixels of image 1: in its masked patches, or everywhere else."""
    images = batch.images.clone()
    for patch in range(16):
        if (patch in masks.patch_ids[1].tolist()) == masked:
            top, left = patch // 4 * 8, patch % 4 * 8
            images[1, :, top : top + 8, left : left + 8] = 255 - images[1, :, top : top + 8, left : left + 8]
    return replace(batch, images=images)


def change_tokens(batch: Batch, masks: Masks, *, masked: bool) -> Batch:
    """Change tokens of caption 2: the masked ones, or the others."""
    tokens, (start, end) = batch.tokens.clone(), batch.cu_seqlens[2:4].tolist()
    for place in range(start + 1, end - 1):
        if (place in masks.token_ids.tolist()) == masked:
            tokens[place] = 5 + (tokens[place] + 90) % 290
    return replace(batch, tokens=tokens)


def caption_of_masked_tokens(batch: Batch, masks: Masks) -> torch.Tensor:
    """The caption of each masked token."""
    return torch.tensor([int((batch.cu_seqlens[1:] <= t).sum()) for t in masks.token_ids])


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_predicted_pixels_do_not_depend_on_masked_pixels(predictions, cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)
    after = predictions(model, change_pixels(batch, masks, masked=True), masks)
    assert torch.equal(after["pixels"], before["pixels"])
    assert (after["target"][1] != before["target"][1]).any(-1).all()
    # Visible pixels matter, but only to their own image.
    after = predictions(model, change_pixels(batch, masks, masked=False), masks)
    assert torch.equal(after["target"], before["target"])
    for row in range(5):
        assert torch.equal(after["pixels"][row], before["pixels"][row]) == (row != 1)


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_predicted_tokens_do_not_depend_on_masked_tokens(predictions, cross_norm):
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)
    after = predictions(model, change_tokens(batch, masks, masked=True), masks)
    assert torch.equal(after["logits"], before["logits"])
    changed = after["tokens"] != before["tokens"]
    assert changed.tolist() == (caption_of_masked_tokens(batch, masks) == 2).tolist()
    after = predictions(model, change_tokens(batch, masks, masked=False), masks)
    assert torch.equal(after["tokens"], before["tokens"])
    for number, row in enumerate(caption_of_masked_tokens(batch, masks).tolist()):
        assert torch.equal(after["logits"][number], before["logits"][number]) == (row != 2)


@pytest.mark.parametrize("masked", [False, True])
def test_masked_captions_see_the_masked_pixels_only_of_an_unmasked_partner(predictions, masked):
    model = micro_model(image_mask_ratio=0.5, mask_partner=masked)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["logits"]
    after = predictions(model, change_pixels(batch, masks, masked=True), masks)["logits"]
    assert torch.equal(before, after) == masked
    assert not torch.equal(before, predictions(model, change_pixels(batch, masks, masked=False), masks)["logits"])


@pytest.mark.parametrize("masked", [False, True])
def test_masked_images_see_the_masked_tokens_only_of_an_unmasked_partner(predictions, masked):
    model = micro_model(mask_partner=masked)
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["pixels"]
    after = predictions(model, change_tokens(batch, masks, masked=True), masks)["pixels"]
    assert torch.equal(before, after) == masked
    assert not torch.equal(before, predictions(model, change_tokens(batch, masks, masked=False), masks)["pixels"])
