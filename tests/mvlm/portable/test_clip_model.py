"""open_clip's interface of a trained model gives the trained model's embeddings, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.errors import ConfigError
from mvlm.portable.clip_model import create_clip_model
from mvlm.tasks.load import load_model
from support.scenes import scene

TEXTS = ["red top left on white", "a", "a blue square, blue bottom right on black, and more words than fit"]
IMAGES = [Image.fromarray(scene(number, side)[0]) for number, side in ((0, 32), (9, 47), (21, 100))]


@pytest.fixture(scope="module")
def trained_model(trained):
    return load_model(trained, "cpu", "fp32")


def test_embeddings_are_those_of_the_trained_model_to_the_bit(trained_model):
    model, preprocess, tokenizer = create_clip_model(trained_model)
    pixels, ids = torch.stack([preprocess(image) for image in IMAGES]), tokenizer(TEXTS)
    assert torch.equal(model.encode_image(pixels), trained_model.embed_images(IMAGES))
    assert torch.equal(model.encode_text(ids), trained_model.embed_texts(TEXTS, truncate=True))
    image, text, scale = model(pixels, ids)
    assert torch.equal(image @ text.T, trained_model.similarity(image, text))
    assert scale.item() == pytest.approx(trained_model.network.log_scale.exp().item())
    assert not model.training


def test_autocast_of_the_caller_and_pixels_as_floats_change_nothing(trained_model):
    model, preprocess, tokenizer = create_clip_model(trained_model)
    pixels, ids = preprocess(IMAGES[0])[None], tokenizer(TEXTS[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode_image(pixels), model.encode_text(ids)
    assert torch.equal(found[0], model.encode_image(pixels))
    assert torch.equal(found[1], model.encode_text(ids))
    torch.testing.assert_close(model.encode_image(pixels / 255), found[0])


def test_the_tokenizer_pads_and_truncates(trained_model):
    tokenizer = create_clip_model(trained_model).tokenizer
    ids = tokenizer(TEXTS)
    assert (ids.shape, ids.dtype) == ((3, 12), torch.int64)
    for row, text in zip(ids, TEXTS, strict=True):
        wanted = trained_model.tokenizer.encode([text], 12)[0]
        np.testing.assert_array_equal(row[row != trained_model.tokenizer.pad_id].numpy(), wanted)
    assert tokenizer("a", context_length=5).shape == (1, 5)
    for wrong in (2, 13):
        with pytest.raises(ConfigError, match=f"context_length: wanted 3 to 12, got {wrong}"):
            tokenizer("a", context_length=wrong)


def test_no_texts_give_no_embeddings_and_a_row_without_tokens_is_refused(trained_model):
    model, _, tokenizer = create_clip_model(trained_model)
    assert model.encode_text(tokenizer([])).shape == trained_model.embed_texts([]).shape
    with pytest.raises(ConfigError, match="text: wanted tokens in each row, found a row of padding alone"):
        model.encode_text(torch.full((2, 5), model.pad_id))
