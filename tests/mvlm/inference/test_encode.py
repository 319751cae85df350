"""Features of a split, against each image and caption alone."""

import numpy as np
import pytest
import torch

from mvlm.inference import encode
from mvlm.inference.encode import encode_captions, encode_split, eval_loader
from support.models import micro_model
from support.scenes import scene


@pytest.fixture(scope="module")
def model():
    return micro_model(dtype=torch.float32).eval()


def test_encoded_captions_are_padded_to_the_models_length(model, tokenizer):
    captions = ["red top left on white", "blue", "a square, green bottom right on black, " * 5]
    with torch.no_grad():
        w, key_mask = encode_captions(model, captions, tokenizer)
    assert w.shape == (3, 12, 16)
    assert key_mask.shape == (3, 12)
    for row, caption in enumerate(captions):
        length = len(tokenizer.encode([caption], 12)[0])
        assert key_mask[row].tolist() == [column < length for column in range(12)]
        assert (w[row, length:] == 0).all()
    assert key_mask[2].all()


def test_eval_loader_yields_uncropped_images_and_first_captions_in_order(model, heldout_split, tokenizer):
    seen = []
    for batch, masks in eval_loader(heldout_split, model, tokenizer):
        starts = batch.cu_seqlens.tolist()
        for row, i in enumerate(batch.sample_id.tolist()):
            seen.append(i)
            pixels, caption = scene(3 * i + 1)
            # the images have the model's size, so nothing is resized
            assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
            assert batch.tokens[starts[row] : starts[row + 1]].tolist() == tokenizer.encode([caption], 12)[0].tolist()
        assert masks.patch_ids.shape[1] == 8  # two of four blocks, of four patches each
    assert seen == list(range(8))


def test_masks_of_eval_loader_depend_on_its_seed(model, heldout_split, tokenizer):
    drawn = [next(iter(eval_loader(heldout_split, model, tokenizer, seed)))[1] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].patch_ids, drawn[1].patch_ids)
    assert torch.equal(drawn[0].token_ids, drawn[1].token_ids)
    assert not torch.equal(drawn[0].patch_ids, drawn[2].patch_ids)


@pytest.mark.parametrize("batch", [64, 3])
def test_features_of_a_split_are_those_of_each_image_and_caption_alone(
    model, heldout_split, tokenizer, monkeypatch, batch
):
    monkeypatch.setattr(encode, "BATCH", batch)
    found = encode_split(model, heldout_split, tokenizer, "fp32")
    captions = [caption for i in range(8) for caption in heldout_split.captions(i)]
    assert found.captions == captions
    assert len(captions) == 12  # every second image has two
    assert found.owner.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert found.first.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert found.v.shape == (8, 17, 16)
    assert found.w.shape == (12, 12, 16)
    with torch.no_grad():
        for i in range(8):
            pixels = torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)[None]
            v = model.encode_image(pixels)
            torch.testing.assert_close(found.v[i], v[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.image_embedding[i], model.embed_image(v)[0], rtol=0, atol=1e-6)
        for t, caption in enumerate(captions):
            tokens = torch.from_numpy(tokenizer.encode([caption], 12)[0])
            length = len(tokens)
            w, _ = model.encode_text(tokens, torch.tensor([0, length]), length)
            assert found.key_mask[t].sum().item() == length
            torch.testing.assert_close(found.w[t, :length], w[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.text_embedding[t], model.embed_text(w)[0], rtol=0, atol=1e-6)
    for embedding in (found.image_embedding, found.text_embedding):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))
