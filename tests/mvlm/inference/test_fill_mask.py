"""Guesses for [MASK] tokens, against the model's own logits."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.inference.fill_mask import fill_mask, fill_text, tokens_with_masks
from mvlm_dataloading import tokenizer_for
from support.models import micro_batch, micro_model


@pytest.fixture
def model():
    return micro_model(dtype=torch.float32).eval()


def test_masks_in_a_caption_are_single_tokens(tokenizer):
    unmasked = tokenizer.encode(["red top left on white"], 12)[0].tolist()
    assert tokens_with_masks("red top left on white", tokenizer, 12).tolist() == unmasked
    found = tokens_with_masks("red [MASK] left on [MASK]", tokenizer, 12).tolist()
    pieces = [tokenizer.encode([words], 12)[0].tolist()[1:-1] for words in ("red", "left on")]
    assert found == [tokenizer.cls_id, *pieces[0], tokenizer.mask_id, *pieces[1], tokenizer.mask_id, tokenizer.sep_id]
    only = tokens_with_masks("[MASK][MASK]", tokenizer, 12).tolist()
    assert only == [tokenizer.cls_id, tokenizer.mask_id, tokenizer.mask_id, tokenizer.sep_id]


def test_a_caption_with_masks_is_cut_to_length(tokenizer):
    found = tokens_with_masks("[MASK] " * 10 + "red blue", tokenizer, 12).tolist()
    assert found == [tokenizer.cls_id, *[tokenizer.mask_id] * 10, tokenizer.sep_id]
    with pytest.raises(ConfigError, match=r"wanted every \[MASK\] among the first 10 tokens"):
        tokens_with_masks("[MASK] " * 11, tokenizer, 12)


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


def test_guesses_against_the_models_logits(model, tokenizer):
    """Every caption alone, without padding. The masked tokens themselves have no influence."""
    batch, masks = micro_batch()
    starts = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(starts)]
    guesses, probabilities = fill_mask(
        model, tokenizer, batch.images, batch.tokens, lengths, masks.token_ids, 4, "fp32"
    )
    assert guesses.shape == probabilities.shape == (len(masks.token_ids), 4)
    others = batch.tokens.clone()
    others[masks.token_ids] = 77
    again = fill_mask(model, tokenizer, batch.images, others, lengths, masks.token_ids, 4, "fp32")
    assert torch.equal(again[0], guesses)
    assert torch.equal(again[1], probabilities)
    assert (probabilities[:, :-1] >= probabilities[:, 1:]).all()
    with torch.no_grad():
        for number, position in enumerate(masks.token_ids.tolist()):
            row = max(b for b in range(5) if starts[b] <= position)
            caption = [
                4 if t in masks.token_ids.tolist() else batch.tokens[t].item() for t in range(*starts[row : row + 2])
            ]
            wm, _ = model.encode_text(torch.tensor(caption), torch.tensor([0, len(caption)]), len(caption))
            x = model.text_cross(wm, model.encode_image(batch.images[row : row + 1]))
            logits = model.language_head(x[0, position - starts[row]]).double().numpy()[: tokenizer.vocab_size]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            order = np.argsort(-p)[:4]
            assert guesses[number].tolist() == order.tolist()
            np.testing.assert_allclose(probabilities[number].numpy(), p[order], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_masks_are_filled_most_probable_first(model, tokenizer, steps):
    """Against a loop that asks for one step at a time; with one step, all guesses are those of the whole."""
    image, text = micro_batch((6,))[0].images[0], "red [MASK] left [MASK] on [MASK] [MASK]"
    found = fill_text(model, tokenizer, text, image, top=2, precision="fp32", steps=steps)
    tokens = tokens_with_masks(text, tokenizer, 12).tolist()
    every = [i for i, t in enumerate(tokens) if t == tokenizer.mask_id]
    wanted = {}
    for number in {1: [4], 2: [2, 2], 3: [2, 1, 1], 4: [1] * 4, 9: [1] * 4}[steps]:
        left = [i for i in every if i not in wanted]
        guesses, chances = fill_mask(
            model, tokenizer, image[None], torch.tensor(tokens), [len(tokens)], torch.tensor(left), 2, "fp32"
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


def test_no_step_is_refused(model, tokenizer):
    with pytest.raises(ConfigError, match="steps: wanted at least 1, got 0"):
        fill_text(model, tokenizer, "[MASK]", micro_batch((6,))[0].images[0], steps=0)
