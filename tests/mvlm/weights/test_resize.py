"""Position embeddings resized to another resolution and length: timm's function is the oracle for images."""

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from mvlm.errors import ConfigError
from mvlm.inference.encode import text_features
from mvlm.model.encoders import resize_positions
from mvlm.tasks.load import load_model
from mvlm.weights.resize import resized_config, resized_model
from support.models import micro_config, micro_model


@pytest.mark.parametrize("old, new", [(14, 24), (24, 14), (6, 7), (4, 4)])
def test_positions_of_images_are_timms(old, new):
    position = torch.randn(1 + old * old, 8, generator=torch.Generator().manual_seed(0))
    wanted = resample_abs_pos_embed(position[None], [new, new], [old, old], num_prefix_tokens=1)[0]
    torch.testing.assert_close(resize_positions(position, new), wanted, rtol=0, atol=1e-6)


def test_both_towers_are_resized_and_say_so(caplog):
    model = micro_model(dtype=torch.float32).eval()
    with caplog.at_level("INFO"):
        resized = resized_model(model, 48, 20)
    assert "image_size: 48 pixels, where the model was trained with 32" in caplog.text
    assert "text_length: 20 tokens, where the model was trained with 12" in caplog.text
    before, after = model.state_dict(), resized.state_dict()
    assert torch.equal(after["text_encoder.position"][:12], before["text_encoder.position"])
    assert torch.equal(after["image_encoder.position"][0], before["image_encoder.position"][0])
    same = [name for name in before if not name.endswith(".position")]
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert not resized.training
    assert resized_model(model, 32, 12) is model


def test_a_resized_model_keeps_its_numbers_and_what_is_frozen():
    model = micro_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-12)  # no longer a number of fp32
    model.image_encoder.requires_grad_(False)
    resized = resized_model(model, 48)
    for name, parameter in model.named_parameters():
        other = resized.get_parameter(name)
        assert other.requires_grad == parameter.requires_grad
        assert name == "image_encoder.position" or torch.equal(other, parameter), name


@pytest.mark.slow
def test_a_trained_model_takes_shorter_texts_as_it_did_and_no_longer_ones(trained):
    """Truncated positions change no text that is short enough; positions that nothing trained are refused."""
    whole, short = load_model(trained, "cpu"), load_model(trained, "cpu", image_size=48, text_length=8)
    assert short.network.config.text_length == 8
    one, other = (text_features(m.network, ["red top"], m.tokenizer, "fp32").embedding for m in (whole, short))
    assert torch.equal(one, other)
    assert short.embed_images([torch.zeros(3, 40, 60, dtype=torch.uint8)]).shape == (1, 8)
    with pytest.raises(
        ConfigError, match=r"text_length: wanted at most the 12 tokens .* fine-tune it with --question-l"
    ):
        load_model(trained, "cpu", text_length=13)
    with pytest.raises(ConfigError, match="mask_block must divide image_size: wanted a divisor of 50, got 16"):
        load_model(trained, "cpu", image_size=50)


@pytest.mark.parametrize("size", [{"image_size": 0}, {"text_length": 0}])
def test_a_size_of_zero_is_no_default(size):
    with pytest.raises(ConfigError):
        resized_config(micro_config(), **size)
