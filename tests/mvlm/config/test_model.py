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


@pytest.mark.parametrize("name, millions", [("tiny", 10), pytest.param("base", 335, marks=pytest.mark.slow)])
def test_presets_have_the_documented_number_of_parameters(name, millions):
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in MaskVLM(MaskVLMConfig.preset(name)).parameters())
    assert round(found / 1e6) == pytest.approx(millions, rel=0.02)


LAYERS = [f"{name}_layers" for name in ("image", "text", "cross", "decoder")]
INVALID: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(LAYERS, (0,)),
    "mask_block": (24, 0),
    "patch_size": (12, 0),
    "heads": (3, 0),
    "itc_width": (0,),
    "width": (-16,),
    "text_length": (2,),
    "cross_norm": ("both",),
    "initialization": ("zeros",),
    "mask_token_id": (300, -1),
    "image_mask_ratio": (0.1, 1.2, math.nan),
    "text_mask_ratio": (1.5,),
    "contrastive": ("hinge",),
    "temperature": (0.51, 0.0),
    "image_mean": ((0.5, math.inf, 0.5),),
    "image_std": ((0.5, 0.0, 0.5),),
}
"""Values of the micro model's settings."""


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, values in INVALID.items() for value in values),
        {"output_positions": True, "width": 30, "heads": 1},
    ],
    ids=str,
)
def test_invalid_settings_of_a_model_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        micro_config(**changes)


def test_options_of_the_loader_are_the_models_sizes_and_masks():
    config = micro_config(
        patch_size=4, mask_block=8, image_mask_ratio=0.25, text_mask_ratio=0.5, text_length=9,
        whole_word_masking=True, mask_partner=True,
    )  # fmt: skip
    sizes = {"image_size": 32, "text_length": 9}
    shares = {"patch_size": 4, "mask_block": 8, "image_mask_ratio": 0.25, "text_mask_ratio": 0.5}
    assert config.loader_options() == sizes | {"masking": Masking(**shares, whole_word_masking=True)}
    assert config.loader_options(train=False) == sizes | {"masking": Masking(**shares)}
    assert config.loader_options().keys() <= inspect.signature(Loader).parameters.keys()
