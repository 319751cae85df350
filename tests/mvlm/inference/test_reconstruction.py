"""Reconstructed images, against the model's own predictions."""

import numpy as np
import pytest
import torch

from mvlm.inference.images import GREY, hide_patches
from mvlm.inference.reconstruction import border_errors, reconstruct, reconstruction_strip
from mvlm.model.encoders import patchify, unpatchify
from support.models import micro_batch, micro_model
from support.scenes import scene


@pytest.fixture
def model():
    return micro_model(dtype=torch.float32).eval()


def test_a_reconstruction_has_the_models_pixels_in_masked_patches_only(model, tokenizer):
    """The pixel head is made to answer constants, so that the bytes are known: 255 (x std + mean), cut to 0..255."""
    batch, masks = micro_batch()
    answers = [0.5, 3.5, -0.25]  # by channel; green leaves the range of bytes
    with torch.no_grad():
        model.pixel_head.weight.zero_()
        model.pixel_head.bias.copy_(torch.tensor(answers).repeat_interleave(64))
    wanted = [
        round(255 * min(1, a * s + m)) for a, s, m in zip(answers, (0.5, 0.25, 0.2), (0.5, 0.4, 0.3), strict=True)
    ]
    assert wanted == [191, 255, 64]
    found = reconstruct(model, tokenizer, batch.images, ["red"] * 5, masks.patch_ids, "fp32")
    assert found.dtype == torch.uint8
    for row in range(5):
        for patch in range(16):
            area = (
                row,
                slice(None),
                slice(patch // 4 * 8, patch // 4 * 8 + 8),
                slice(patch % 4 * 8, patch % 4 * 8 + 8),
            )
            if patch in masks.patch_ids[row].tolist():
                assert (found[area] == torch.tensor(wanted)[:, None, None]).all()
            else:
                assert torch.equal(found[area], batch.images[area])


def test_a_reconstruction_depends_on_visible_patches_and_the_caption(model, tokenizer):
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(model, tokenizer, batch.images, captions, masks.patch_ids, "fp32")
    hidden = hide_patches(batch.images, masks.patch_ids, 8)
    assert torch.equal(reconstruct(model, tokenizer, hidden, captions, masks.patch_ids, "fp32"), found)
    other = reconstruct(model, tokenizer, batch.images, [captions[0], *captions[2:], "red"], masks.patch_ids, "fp32")
    assert torch.equal(other[0], found[0])
    assert all(not torch.equal(other[row], found[row]) for row in range(1, 5))


def test_a_reconstruction_is_the_models_prediction_for_each_image_alone(model, tokenizer):
    """One image and one caption at a time, without padding."""
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(model, tokenizer, batch.images, captions, masks.patch_ids, "fp32")
    with torch.no_grad():
        for row in range(5):
            tokens = torch.from_numpy(tokenizer.encode([captions[row]], 12)[0])
            masked = torch.tensor([[patch in masks.patch_ids[row].tolist() for patch in range(16)]])
            v = model.encode_image(batch.images[row : row + 1], masked)
            w, everything = model.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens))
            pixels = model.reconstruct(v, w, everything, masks.patch_ids[row : row + 1])[0].double()
            for number, patch in enumerate(masks.patch_ids[row].tolist()):
                shown = found[row, :, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8]
                std, mean = (torch.tensor(x).double()[:, None, None] for x in ((0.5, 0.25, 0.2), (0.5, 0.4, 0.3)))
                exact = 255 * (pixels[number].view(3, 8, 8) * std + mean).clamp(0, 1)
                assert (shown - exact).abs().max() < 0.501  # rounded to the nearest byte


def test_a_reconstruction_strip_has_three_rows_of_eight_images(model, tokenizer, heldout_split):
    strip = reconstruction_strip(model, heldout_split, tokenizer, "fp32")
    assert strip.shape == (3 * 32, 8 * 32, 3)
    original, masked, rebuilt = strip.reshape(3, 32, 8, 32, 3).swapaxes(1, 2)
    for i in range(8):
        assert np.array_equal(original[i], scene(3 * i + 1)[0])
        hidden = (masked[i] == GREY).all(-1)
        assert hidden.sum() == 32 * 32 / 2
        assert np.array_equal(rebuilt[i][~hidden], original[i][~hidden])
        assert not np.array_equal(rebuilt[i][hidden], original[i][hidden])


def test_border_errors_against_loops():
    rng = np.random.default_rng(0)
    side, patch, ids = 3, 2, [[0, 4, 7], [2, 3, 8]]
    patches, pixels = rng.integers(0, 256, (2, 9, 12)), rng.integers(0, 256, (2, 3, 12))
    known = rng.random((2, 9)) < 0.5
    known[1, [1, 5]] = False  # patch 2 of the second image has no known neighbour
    found = border_errors(
        torch.from_numpy(patches), torch.from_numpy(known), torch.from_numpy(pixels), torch.tensor(ids)
    )
    for b in range(2):
        for k, i in enumerate(ids[b]):
            borders = []
            for j in range(9):
                dy, dx = j // side - i // side, j % side - i % side
                if abs(dy) + abs(dx) != 1 or not known[b, j]:
                    continue
                own, theirs = (x.reshape(3, patch, patch) for x in (pixels[b, k], patches[b, j]))
                pairs = [
                    (own[c, t, 0 if dx < 0 else -1], theirs[c, t, -1 if dx < 0 else 0])
                    if dx
                    else (own[c, 0 if dy < 0 else -1, t], theirs[c, -1 if dy < 0 else 0, t])
                    for c in range(3)
                    for t in range(patch)
                ]
                borders.append(np.mean([abs(float(p) - float(q)) for p, q in pairs]))
            assert found[b, k].item() == pytest.approx(np.mean(borders) if borders else float("inf"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps, numbers", [(1, [8]), (3, [3, 3, 2]), (99, [1] * 8)])
def test_patches_are_rebuilt_in_steps(model, tokenizer, steps, numbers):
    """Against a loop that rebuilds all that is left and keeps the patches with the smallest border errors."""
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(model, tokenizer, batch.images, captions, masks.patch_ids, "fp32", steps)
    for b in range(5):
        image, left = batch.images[b : b + 1], masks.patch_ids[b].tolist()
        for number in numbers:
            whole = reconstruct(model, tokenizer, image, captions[b : b + 1], torch.tensor([left]), "fp32")
            known = torch.tensor([[i not in left for i in range(16)]])
            errors = border_errors(patchify(image, 8), known, patchify(whole, 8)[:, left], torch.tensor([left]))[
                0
            ].tolist()
            chosen = sorted(range(len(left)), key=lambda k: errors[k])[:number]
            patches = patchify(image, 8)
            patches[0, [left[k] for k in chosen]] = patchify(whole, 8)[0, [left[k] for k in chosen]]
            image = unpatchify(patches, 8)
            left = [i for k, i in enumerate(left) if k not in chosen]
        assert not left
        assert (found[b].int() - image[0].int()).abs().max() <= 1


def test_a_model_that_drops_masked_patches_rebuilds_them_as_it_was_trained(tokenizer):
    """Its encoder never sees a mask token: the prediction is that from `forward_visible`."""
    model = micro_model(dtype=torch.float32, drop_masked=True).eval()
    batch, masks = micro_batch()
    found = reconstruct(model, tokenizer, batch.images, ["red"] * 5, masks.patch_ids, "fp32")
    visible = torch.stack([torch.tensor([p for p in range(16) if p not in row]) for row in masks.patch_ids.tolist()])
    with torch.no_grad():
        tokens = torch.from_numpy(np.concatenate([tokenizer.encode(["red"], 12)[0]] * 5))
        w, key_mask = model.encode_text(tokens, torch.arange(6) * (len(tokens) // 5), len(tokens) // 5)
        vm = model.image_encoder.forward_visible(batch.images, visible)
        pixels = model.reconstruct(vm, w, key_mask, masks.patch_ids).double()
    std, mean = (torch.tensor(x).double()[:, None, None] for x in ((0.5, 0.25, 0.2), (0.5, 0.4, 0.3)))
    for row in range(5):
        for number, patch in enumerate(masks.patch_ids[row].tolist()):
            shown = found[row, :, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8]
            exact = 255 * (pixels[row, number].view(3, 8, 8) * std + mean).clamp(0, 1)
            assert (shown - exact).abs().max() < 0.501
