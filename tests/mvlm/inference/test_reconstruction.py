from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.errors import ConfigError, RunError
from mvlm.inference.fill_mask import fill_mask, tokens_with_masks
from mvlm.inference.images import GREY, load_image
from mvlm.inference.reconstruction import hide_patches, reconstruct
from mvlm_dataloading import tokenizer_for
from support.models import micro_batch, micro_model
from support.scenes import png, scene


@pytest.fixture
def model():
    return micro_model(dtype=torch.float32).eval()


def test_a_picture_is_loaded_as_it_is(tmp_path):
    pixels, _ = scene(5)
    (tmp_path / "a.png").write_bytes(png(pixels))
    found = load_image(tmp_path / "a.png", 32)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)


def test_a_picture_is_squeezed_to_a_square(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 30:] = (200, 100, 50)
    (tmp_path / "a.png").write_bytes(png(wide))
    found = load_image(tmp_path / "a.png", 32)
    assert found.shape == (3, 32, 32)
    assert found[:, :, :12].max() == 0
    assert found[:, :, 20:].float().mean((1, 2)).tolist() == [200, 100, 50]


def test_transparency_is_laid_on_white(tmp_path):
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:] = (10, 20, 30, 255)
    clear[:8, 16:, 3] = 0
    (tmp_path / "a.png").write_bytes(png(clear))
    found = load_image(tmp_path / "a.png", 32)
    assert (found[:, :, :16] == 255).all()
    assert (found[:, :8] == 255).all()
    assert found[:, 20, 20].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode, value", [("L", 77), ("P", 0), ("1", 1), ("CMYK", (0, 0, 0, 0))])
def test_other_kinds_of_pictures(tmp_path, mode, value):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (40, 40), value).save(path)
    found = load_image(path, 16)
    assert found.shape == (3, 16, 16)
    assert (found == {"L": 77, "P": 0, "1": 255, "CMYK": 255}[mode]).all()


@pytest.mark.parametrize(
    "content, message", [(None, "found no such file"), (b"", "could not"), (b"words", "could not")]
)
def test_a_picture_that_does_not_open(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RunError, match=rf"a\.png: wanted an image, {message}"):
        load_image(tmp_path / "a.png", 32)


def test_a_picture_cut_short_and_a_folder(tmp_path):
    content = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(RunError, match="wanted an image, could not read it"):
            load_image(path, 32)


def test_gaps_in_a_caption(tokenizer):
    whole = tokenizer.encode(["red top left on white"], 12)[0].tolist()
    assert tokens_with_masks("red top left on white", tokenizer, 12).tolist() == whole
    found = tokens_with_masks("red [MASK] left on [MASK]", tokenizer, 12).tolist()
    pieces = [tokenizer.encode([words], 12)[0].tolist()[1:-1] for words in ("red", "left on")]
    assert found == [tokenizer.cls_id, *pieces[0], tokenizer.mask_id, *pieces[1], tokenizer.mask_id, tokenizer.sep_id]
    only = tokens_with_masks("[MASK][MASK]", tokenizer, 12).tolist()
    assert only == [tokenizer.cls_id, tokenizer.mask_id, tokenizer.mask_id, tokenizer.sep_id]


def test_a_caption_with_gaps_is_cut_to_length(tokenizer):
    found = tokens_with_masks("[MASK] " * 10 + "red blue", tokenizer, 12).tolist()
    assert found == [tokenizer.cls_id, *[tokenizer.mask_id] * 10, tokenizer.sep_id]
    with pytest.raises(ConfigError, match=r"wanted every \[MASK\] among the first 10 tokens"):
        tokens_with_masks("[MASK] " * 11, tokenizer, 12)


def test_hidden_patches_are_grey_and_the_rest_is_not():
    batch, masks = micro_batch()
    shown = hide_patches(batch.images, masks.patch_ids, 8)
    for row in range(5):
        for patch in range(16):
            area = (
                row,
                slice(None),
                slice(patch // 4 * 8, patch // 4 * 8 + 8),
                slice(patch % 4 * 8, patch % 4 * 8 + 8),
            )
            if patch in masks.patch_ids[row].tolist():
                assert (shown[area] == GREY).all()
            else:
                assert torch.equal(shown[area], batch.images[area])


def test_what_a_reconstruction_shows(model, tokenizer):
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


def test_a_reconstruction_does_not_see_what_is_hidden_and_reads_the_caption(model, tokenizer):
    batch, masks = micro_batch()
    captions = ["red top left", "blue bottom", "green", "yellow on white", "a square"]
    found = reconstruct(model, tokenizer, batch.images, captions, masks.patch_ids, "fp32")
    hidden = hide_patches(batch.images, masks.patch_ids, 8)
    assert torch.equal(reconstruct(model, tokenizer, hidden, captions, masks.patch_ids, "fp32"), found)
    other = reconstruct(model, tokenizer, batch.images, [captions[0], *captions[2:], "red"], masks.patch_ids, "fp32")
    assert torch.equal(other[0], found[0])
    assert all(not torch.equal(other[row], found[row]) for row in range(1, 5))


def test_a_reconstruction_is_what_the_model_predicts(model, tokenizer):
    """One picture and one caption at a time, without padding."""
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


def test_guesses_are_tokens_that_there_are(train_split):
    """A model may have rows for more tokens than the tokenizer: they are never a guess, however likely."""
    few = tokenizer_for(train_split, 270)
    assert few.vocab_size == 270
    model = micro_model(dtype=torch.float32).eval()
    with torch.no_grad():
        model.language_head.vocabulary.bias[270:] += 1000
    batch, masks = micro_batch((6,))
    guesses, chances = fill_mask(model, few, batch.images, batch.tokens % 270, [6], masks.token_ids, 270, "fp32")
    assert sorted(guesses[0].tolist()) == list(range(270))
    assert chances.sum(1).tolist() == pytest.approx([1.0] * len(masks.token_ids))


def test_guesses_against_the_models_logits(model, tokenizer):
    """Every caption alone, without padding; the hidden tokens themselves are not looked at."""
    batch, masks = micro_batch()
    starts = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(starts)]
    guesses, chances = fill_mask(model, tokenizer, batch.images, batch.tokens, lengths, masks.token_ids, 4, "fp32")
    assert guesses.shape == chances.shape == (len(masks.token_ids), 4)
    others = batch.tokens.clone()
    others[masks.token_ids] = 77
    again = fill_mask(model, tokenizer, batch.images, others, lengths, masks.token_ids, 4, "fp32")
    assert torch.equal(again[0], guesses)
    assert torch.equal(again[1], chances)
    assert (chances[:, :-1] >= chances[:, 1:]).all()
    with torch.no_grad():
        for number, place in enumerate(masks.token_ids.tolist()):
            row = max(b for b in range(5) if starts[b] <= place)
            caption = [
                4 if t in masks.token_ids.tolist() else batch.tokens[t].item() for t in range(*starts[row : row + 2])
            ]
            wm, _ = model.encode_text(torch.tensor(caption), torch.tensor([0, len(caption)]), len(caption))
            x = model.text_cross(wm, model.encode_image(batch.images[row : row + 1]))
            logits = model.language_head(x[0, place - starts[row]]).double().numpy()[: tokenizer.vocab_size]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            order = np.argsort(-p)[:4]
            assert guesses[number].tolist() == order.tolist()
            np.testing.assert_allclose(chances[number].numpy(), p[order], rtol=1e-4)
