"""Guesses for [MASK] tokens, and rebuilt patches, against the model's own predictions."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.inference.images import GREY
from mvlm.inference.masked import border_errors, fill_mask, reconstruct, reconstruction_strip, tokens_with_masks
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.encoders import patchify, unpatchify
from mvlm_dataloading import tokenizer_for
from support.models import micro_batch, micro_model
from support.scenes import scene


@pytest.fixture
def network():
    return micro_model(dtype=torch.float32).eval()


def test_masks_in_a_caption_are_single_tokens(tokenizer):
    found = tokens_with_masks("red [MASK] left on [MASK]", tokenizer, 12).tolist()
    pieces = [tokenizer.encode([words], 12)[0].tolist()[1:-1] for words in ("red", "left on")]
    assert found == [tokenizer.cls_id, *pieces[0], tokenizer.mask_id, *pieces[1], tokenizer.mask_id, tokenizer.sep_id]
    only = tokens_with_masks("[MASK][MASK]", tokenizer, 12).tolist()
    assert only == [tokenizer.cls_id, tokenizer.mask_id, tokenizer.mask_id, tokenizer.sep_id]


def test_guesses_are_tokens_of_the_tokenizer(train_split):
    """The LM head may be larger than the tokenizer's vocabulary; its other rows are never a guess, however likely."""
    few = tokenizer_for(train_split, 270)
    assert few.vocab_size == 270
    model = micro_model(dtype=torch.float32).eval()
    with torch.no_grad():
        model.language_head.vocabulary.bias[270:] += 1000
    batch, masks = micro_batch((6,))
    guesses, probabilities = fill_mask(model, few, batch.images, batch.tokens % 270, [6], masks.token_ids, 270, "fp32")
    assert sorted(guesses[0].tolist()) == list(range(270))
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * len(masks.token_ids))


def test_guesses_against_the_models_logits(network, tokenizer):
    """Every caption alone, without padding. The masked tokens themselves have no influence."""
    batch, masks = micro_batch()
    starts = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(starts)]
    guesses, probabilities = fill_mask(
        network, tokenizer, batch.images, batch.tokens, lengths, masks.token_ids, 4, "fp32"
    )
    assert guesses.shape == probabilities.shape == (len(masks.token_ids), 4)
    others = batch.tokens.clone()
    others[masks.token_ids] = 77
    again = fill_mask(network, tokenizer, batch.images, others, lengths, masks.token_ids, 4, "fp32")
    assert torch.equal(again[0], guesses)
    assert torch.equal(again[1], probabilities)
    assert (probabilities[:, :-1] >= probabilities[:, 1:]).all()
    with torch.no_grad():
        for number, position in enumerate(masks.token_ids.tolist()):
            row = max(b for b in range(5) if starts[b] <= position)
            caption = [
                4 if t in masks.token_ids.tolist() else batch.tokens[t].item() for t in range(*starts[row : row + 2])
            ]
            wm, _ = network.encode_text(torch.tensor(caption), torch.tensor([0, len(caption)]), len(caption))
            x = network.text_cross(wm, network.encode_image(batch.images[row : row + 1]))
            logits = network.language_head(x[0, position - starts[row]]).double().numpy()[: tokenizer.vocab_size]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            order = np.argsort(-p)[:4]
            assert guesses[number].tolist() == order.tolist()
            np.testing.assert_allclose(probabilities[number].numpy(), p[order], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_masks_are_filled_most_probable_first(network, tokenizer, steps):
    """Against a loop that asks for one step at a time; with one step, all guesses are those of the whole."""
    image, text = micro_batch((6,))[0].images[0], "red [MASK] left [MASK] on [MASK] [MASK]"
    found = TrainedModel(network, tokenizer, "fp32").fill(text, image, top=2, steps=steps)
    tokens = tokens_with_masks(text, tokenizer, 12).tolist()
    every = [i for i, t in enumerate(tokens) if t == tokenizer.mask_id]
    wanted = {}
    for number in {1: [4], 2: [2, 2], 3: [2, 1, 1], 4: [1] * 4, 9: [1] * 4}[steps]:
        left = [i for i in every if i not in wanted]
        guesses, chances = fill_mask(
            network, tokenizer, image[None], torch.tensor(tokens), [len(tokens)], torch.tensor(left), 2, "fp32"
        )
        ranked = sorted(range(len(left)), key=lambda k: -chances[k, 0].item())[:number]
        for k in ranked:
            wanted[left[k]] = (guesses[k].tolist(), chances[k].tolist())
        for k in ranked:
            tokens[left[k]] = guesses[k, 0].item()
    assert found.text == tokenizer.decode(tokens)
    assert len(found.guesses) == 4
    for row, i in zip(found.guesses, every, strict=True):
        assert [guess.token for guess in row] == [tokenizer.decode([t]) for t in wanted[i][0]]
        assert [guess.probability for guess in row] == pytest.approx(wanted[i][1], abs=1e-6)


@pytest.mark.parametrize("drop_masked, target", [(False, "pixels"), (True, "pixels"), (False, "normalized")])
def test_a_reconstruction_is_the_models_prediction_for_each_image_alone(tokenizer, drop_masked, target):
    """One image and one caption at a time, without padding. An encoder that drops masked patches sees no mask token.

    Normalised patches get the mean and deviation that the model predicts.
    """
    model = micro_model(dtype=torch.float32, drop_masked=drop_masked, mim_target=target).eval()
    layer, mean_of_patch, deviation = model.pixel_head.statistics, 0.0, 1.0
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(model, tokenizer, batch.images, captions, masks.patch_ids, "fp32")
    std, mean = (torch.tensor(x).double()[:, None, None] for x in ((0.5, 0.25, 0.2), (0.5, 0.4, 0.3)))
    for row, image in enumerate(batch.images.split(1)):
        tokens = torch.from_numpy(tokenizer.encode([captions[row]], 12)[0])
        hidden = masks.patch_ids[row].tolist()
        shown = [patch for patch in range(16) if patch not in hidden]
        with torch.no_grad():
            if drop_masked:
                visible = torch.tensor([shown])
                v = model.image_encoder.with_mask_tokens(model.image_encoder.forward_visible(image, visible), visible)
            else:
                v = model.encode_image(image, torch.tensor([[patch in hidden for patch in range(16)]]))
            w, everything = model.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens))
            x = model.masked_features(v, w, everything, masks.patch_ids[row : row + 1])[0]
            if layer is not None:
                mean_of_patch, deviation = (x @ layer.weight.T + layer.bias).split(1, dim=1)
                deviation = torch.where(deviation > 0, deviation, 0)
            head = model.pixel_head
            pixels = (mean_of_patch + deviation * (x @ head.weight.T + head.bias)).double()
        mine, given = patchify(found[row : row + 1], 8)[0], patchify(image, 8)[0]
        assert torch.equal(mine[shown], given[shown])
        exact = 255 * (pixels.view(-1, 3, 8, 8) * std + mean).clamp(0, 1)
        assert (mine[hidden].view(-1, 3, 8, 8) - exact).abs().max() < 0.501  # rounded to the nearest byte


def test_a_reconstruction_strip_has_three_rows_of_eight_images(network, tokenizer, heldout_split):
    strip = reconstruction_strip(network, heldout_split, tokenizer, "fp32")
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
def test_patches_are_rebuilt_in_steps(network, tokenizer, steps, numbers):
    """Against a loop that rebuilds all that is left and keeps the patches with the smallest border errors."""
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(network, tokenizer, batch.images, captions, masks.patch_ids, "fp32", steps)
    for b in range(5):
        image, left = batch.images[b : b + 1], masks.patch_ids[b].tolist()
        for number in numbers:
            whole = reconstruct(network, tokenizer, image, captions[b : b + 1], torch.tensor([left]), "fp32")
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
