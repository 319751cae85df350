"""Predictions of masked patches and tokens depend on what is visible, and on nothing that is masked."""

from dataclasses import replace

import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import losses as objectives
from mvlm_dataloading import Batch, Masks
from support.models import micro_batch, micro_model, weighted


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
            model(batch, masks, objectives=weighted(1, 1, 0, 0))
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


@pytest.mark.slow
@pytest.mark.parametrize("cross_norm", ["post", "pre"])
@pytest.mark.parametrize(
    ("change", "predicted", "target", "changed"),
    [(change_pixels, "pixels", "target", 1), (change_tokens, "logits", "tokens", 2)],
)
def test_predictions_do_not_depend_on_what_is_masked(predictions, cross_norm, change, predicted, target, changed):
    """Visible patches and tokens matter, but only to the predictions of its own image or caption."""
    model = micro_model(cross_norm=cross_norm)
    batch, masks = micro_batch()
    own = (torch.arange(5) if predicted == "pixels" else caption_of_masked_tokens(batch, masks)) == changed
    before = predictions(model, batch, masks)
    after = predictions(model, change(batch, masks, masked=True), masks)
    assert torch.equal(after[predicted], before[predicted])
    assert torch.equal((after[target] != before[target]).reshape(len(own), -1).any(1), own)
    after = predictions(model, change(batch, masks, masked=False), masks)
    assert torch.equal(after[target], before[target])
    assert torch.equal((after[predicted] != before[predicted]).reshape(len(own), -1).any(1), own)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("change", "predicted"), [(change_pixels, "logits"), (change_tokens, "pixels")])
def test_masked_inputs_see_what_is_masked_only_of_an_unmasked_partner(predictions, masked, change, predicted):
    model = micro_model(image_mask_ratio=0.5, mask_partner=masked)
    batch, masks = micro_batch(config=model.config)
    before = predictions(model, batch, masks)[predicted]
    after = predictions(model, change(batch, masks, masked=True), masks)[predicted]
    assert torch.equal(before, after) == masked
    assert not torch.equal(before, predictions(model, change(batch, masks, masked=False), masks)[predicted])
