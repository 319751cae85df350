"""Predictions of masked patches and tokens depend on what is visible, and on nothing that is masked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import losses as objectives
from mvlm_dataloading import Batch, Masks
from support.models import micro_batch, micro_model
from support.reference import Reference


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


def test_pixels_are_predicted_from_the_unmasked_caption(predictions):
    """One modality is masked at a time: the caption's tokens matter, their mask does not."""
    model = micro_model()
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["pixels"]
    for masked in (True, False):
        after = predictions(model, change_tokens(batch, masks, masked=masked), masks)["pixels"]
        for row in range(5):
            assert torch.equal(after[row], before[row]) == (row != 2)
    others = masks.token_ids.clone()
    others[0] = next(t for t in range(1, 6) if t not in masks.token_ids.tolist())
    assert torch.equal(predictions(model, batch, replace(masks, token_ids=others))["pixels"], before)


def test_tokens_are_predicted_from_the_unmasked_image(predictions):
    model = micro_model()
    batch, masks = micro_batch()
    before = predictions(model, batch, masks)["logits"]
    for masked in (True, False):
        after = predictions(model, change_pixels(batch, masks, masked=masked), masks)["logits"]
        for number, row in enumerate(caption_of_masked_tokens(batch, masks).tolist()):
            assert torch.equal(after[number], before[number]) == (row != 1)
    others = replace(masks, patch_ids=15 - masks.patch_ids.flip(1))
    assert not torch.equal(others.patch_ids, masks.patch_ids)
    assert torch.equal(predictions(model, batch, others)["logits"], before)


def test_targets_are_the_masked_tokens_and_pixels(predictions):
    model = micro_model()
    batch, masks = micro_batch()
    found = predictions(model, batch, masks)
    assert found["tokens"].tolist() == [batch.tokens[t].item() for t in masks.token_ids.tolist()]
    assert found["target"].shape == found["pixels"].shape == (5, 8, 192)
    for row in range(5):
        wanted = Reference(model).patches(batch.images[row].numpy())[masks.patch_ids[row].numpy()]
        np.testing.assert_allclose(found["target"][row].numpy(), wanted, atol=1e-12)


def test_predictions_of_a_pair_do_not_depend_on_other_pairs(predictions):
    """A pair alone gives the same as in a batch with a longer caption, so padding has no influence."""
    model = micro_model()
    batch, masks = micro_batch()
    together = predictions(model, batch, masks)
    starts = batch.cu_seqlens.tolist()
    for row in range(5):
        a, b = starts[row], starts[row + 1]
        inside = (masks.token_ids >= a) & (masks.token_ids < b)
        alone = predictions(
            model,
            Batch(
                images=batch.images[row : row + 1],
                tokens=batch.tokens[a:b],
                cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
                max_length=b - a,
                image_id=batch.image_id[:1],
                text_id=batch.text_id[:1],
                sample_id=batch.sample_id[:1],
            ),
            Masks(patch_ids=masks.patch_ids[row : row + 1], token_ids=masks.token_ids[inside] - a),
        )
        torch.testing.assert_close(alone["logits"], together["logits"][inside], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone["pixels"][0], together["pixels"][row], rtol=0, atol=1e-12)


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
