"""The configuration of a model and its presets."""

import inspect
import math

import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Loader, Masking
from support.models import micro_config


def count_by_hand(c: MaskVLMConfig) -> int:
    """Number of parameters, added up from the shapes in the method."""
    norm, attention, mlp = 2 * c.width, 4 * (c.width**2 + c.width), 8 * c.width**2 + 5 * c.width
    pixels = 3 * c.patch_size**2
    image = (pixels + 1) * c.width  # patch projection
    image += 2 * c.width + (1 + (c.image_size // c.patch_size) ** 2) * c.width  # mask token, [CLS], positions
    image += c.image_layers * (attention + mlp + 2 * norm) + norm
    text = (c.vocab_size + c.text_length) * c.width + norm + c.text_layers * (attention + mlp + 2 * norm)
    block, last = 2 * attention + mlp + 3 * norm, norm if c.cross_norm == "pre" else 0
    cross = (2 * c.cross_layers + c.decoder_layers) * block + 3 * last
    heads = (c.width + 1) * pixels  # pixels
    heads += c.width**2 + c.width + norm + (c.width + 1) * c.vocab_size  # tokens
    heads += 2 * (c.width + 1) * c.itc_width + 1 + 2 * (c.width + 1)  # ITC, its temperature, ITM
    return image + text + cross + heads


@pytest.mark.parametrize("name, millions", [("tiny", 10), pytest.param("base", 335, marks=pytest.mark.slow)])
def test_presets_have_the_documented_number_of_parameters(name, millions):
    config = MaskVLMConfig.preset(name)
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in MaskVLM(config).parameters())
    assert found == count_by_hand(config)
    assert round(found / 1e6) == pytest.approx(millions, rel=0.02)


LAYERS = [f"{name}_layers" for name in ("image", "text", "cross", "decoder")]
AT_LEAST_1 = ("heads", "patch_size", "mask_block", "itc_width", *LAYERS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_block": 24}, "mask_block must divide image_size: wanted a divisor of 32, got 24"),
        ({"patch_size": 12}, "patch_size must divide mask_block: wanted a divisor of 16, got 12"),
        ({"heads": 3}, "heads must divide width: wanted a divisor of 16, got 3"),
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in AT_LEAST_1),
        ({"width": -16}, "width must be at least 1, got -16"),
        ({"text_length": 2}, "text_length must be at least 3"),
        ({"cross_norm": "both"}, 'cross_norm must be "post" or "pre", got \'both\''),
        ({"initialization": "zeros"}, 'initialization must be "normal" or "xavier", got \'zeros\''),
        ({"output_positions": True, "width": 30, "heads": 1}, "4 must divide width with output_positions"),
        ({"mask_token_id": 300}, r"mask_token_id must be in \[0, 300\), got 300"),
        ({"mask_token_id": -1}, r"mask_token_id must be in \[0, 300\), got -1"),
        ({"image_mask_ratio": 0.1}, "image_mask_ratio must hide 1 to 4 of 4 blocks, got 0.1"),
        ({"image_mask_ratio": 1.2}, "image_mask_ratio must hide 1 to 4 of 4 blocks, got 1.2"),
        ({"text_mask_ratio": 1.5}, r"text_mask_ratio must be in \[0, 1\], got 1.5"),
        ({"contrastive": "hinge"}, 'contrastive must be "softmax" or "sigmoid", got \'hinge\''),
        ({"text_masking": "none"}, 'text_masking must be "fixed" or "variable", got \'none\''),
        ({"image_masking": "variable", "drop_masked": True}, "image_masking: wanted fixed with drop_masked"),
        ({"temperature": 0.51}, r"temperature must be in \[0.001, 0.5\], got 0.51"),
        ({"temperature": 0.0}, r"temperature must be in \[0.001, 0.5\], got 0.0"),
        ({"image_mask_ratio": math.nan}, "image_mask_ratio must be a finite number, got nan"),
        ({"image_mean": (0.5, math.inf, 0.5)}, "image_mean must be a finite number, got inf"),
        ({"image_std": (0.5, 0.0, 0.5)}, r"image_std must be above 0, got \(0.5, 0.0, 0.5\)"),
    ],
)
def test_invalid_settings_of_a_model_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        micro_config(**changes)


def test_options_of_the_loader_are_the_models_sizes_and_masks():
    config = micro_config(
        patch_size=4, mask_block=8, image_mask_ratio=0.25, text_mask_ratio=0.5, text_length=9,
        text_masking="variable", whole_word_masking=True, mask_partner=True,
    )  # fmt: skip
    sizes = {"image_size": 32, "text_length": 9}
    shares = {"patch_size": 4, "mask_block": 8, "image_mask_ratio": 0.25, "text_mask_ratio": 0.5}
    assert config.loader_options() == sizes | {
        "masking": Masking(**shares, image_masking="fixed", text_masking="variable", whole_word_masking=True)
    }
    assert config.loader_options(train=False) == sizes | {"masking": Masking(**shares)}
    assert config.loader_options().keys() <= inspect.signature(Loader).parameters.keys()
