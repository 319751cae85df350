import json
import math
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from mvlm.config.json_files import model_config, run_config
from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.recipes import pretrain_defaults
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_config, pretrain_config


def count_by_hand(c: MaskVLMConfig) -> int:
    """Parameters of the method's parts, added up from their shapes."""
    norm, attention, mlp = 2 * c.width, 4 * (c.width**2 + c.width), 8 * c.width**2 + 5 * c.width
    pixels = 3 * c.patch_size**2
    image = (pixels + 1) * c.width  # patch projection
    image += 2 * c.width + (1 + (c.image_size // c.patch_size) ** 2) * c.width  # mask token, [CLS], positions
    image += c.image_layers * (attention + mlp + 2 * norm) + norm
    text = (c.vocab_size + c.text_length) * c.width + norm + c.text_layers * (attention + mlp + 2 * norm)
    block, last = 2 * attention + mlp + 3 * norm, norm if c.cross_norm == "pre" else 0
    cross = (2 * c.cross_layers + c.decoder_layers) * block + 3 * last
    heads = (c.width + 1) * pixels  # pixels
    heads += c.width**2 + c.width + norm + (c.width + 1) * c.vocab_size  # words
    heads += 2 * (c.width + 1) * c.itc_width + 1 + 2 * (c.width + 1)  # ITC, its temperature, ITM
    return image + text + cross + heads


@pytest.mark.parametrize("name, millions", [("tiny", 10), ("base", 335)])
def test_presets_have_the_parameters_they_promise(name, millions):
    config = MaskVLMConfig.preset(name)
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in MaskVLM(config).parameters())
    assert found == count_by_hand(config)
    assert round(found / 1e6) == pytest.approx(millions, rel=0.02)


def test_base_has_the_papers_sizes():
    base = MaskVLMConfig.preset("base")
    assert (base.image_size, base.patch_size, base.width, base.heads) == (224, 16, 768, 12)
    assert (base.image_layers, base.text_layers, base.cross_layers, base.decoder_layers) == (12, 12, 3, 3)
    assert (base.vocab_size, base.text_length, base.itc_width, base.temperature) == (50265, 40, 256, 0.07)
    assert (base.mask_block, base.image_mask_ratio, base.text_mask_ratio) == (32, 0.6, 0.3)
    assert base.cross_norm == "post"
    assert (base.num_patches, base.patch_values) == (196, 768)


def test_small_and_tiny_differ_from_base_in_size():
    small, tiny = MaskVLMConfig.preset("small"), MaskVLMConfig.preset("tiny")
    assert (small.image_size, small.width, small.heads, small.image_layers, small.cross_layers) == (224, 384, 6, 12, 3)
    assert (tiny.image_size, tiny.patch_size, tiny.width, tiny.heads, tiny.vocab_size) == (96, 16, 192, 3, 2048)
    assert (tiny.image_layers, tiny.text_layers, tiny.cross_layers, tiny.decoder_layers) == (6, 6, 2, 2)
    assert tiny.text_length == 24
    assert tiny.num_patches == 36
    # The width of a head is 64 everywhere.
    assert {MaskVLMConfig.preset(name).width / MaskVLMConfig.preset(name).heads for name in PRESETS} == {64}


def test_a_preset_can_be_changed():
    assert MaskVLMConfig.preset("tiny", text_length=30).text_length == 30
    assert MaskVLMConfig.preset("tiny", text_length=30).width == 192


@pytest.mark.parametrize("make", [MaskVLMConfig.preset, lambda name: pretrain_defaults(name, Path("d"), Path("o"))])
def test_an_unknown_preset_is_answered_with_those_there_are(make):
    with pytest.raises(ConfigError, match="unknown preset: wanted one of tiny, small, base, got 'huge'"):
        make("huge")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_recipe(preset):
    config = pretrain_defaults(preset, Path("data"), Path("run"))
    assert config.model == MaskVLMConfig.preset(preset)
    assert (config.data, config.out) == (Path("data"), Path("run"))
    assert config.warmup_steps < config.max_steps
    assert json.loads(json.dumps(config.to_dict()))["data"] == "data"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_block": 24}, "mask_block must divide image_size: wanted a divisor of 32, got 24"),
        ({"patch_size": 12}, "patch_size must divide mask_block: wanted a divisor of 16, got 12"),
        ({"heads": 3}, "heads must divide width: wanted a divisor of 16, got 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"mask_block": 0}, "mask_block must be at least 1, got 0"),
        ({"width": -16}, "width must be at least 1, got -16"),
        ({"image_layers": 0}, "image_layers must be at least 1, got 0"),
        ({"text_layers": 0}, "text_layers must be at least 1, got 0"),
        ({"cross_layers": 0}, "cross_layers must be at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"itc_width": 0}, "itc_width must be at least 1, got 0"),
        ({"text_length": 2}, "text_length must be at least 3"),
        ({"cross_norm": "both"}, 'cross_norm must be "post" or "pre", got \'both\''),
        ({"initialization": "zeros"}, 'initialization must be "normal" or "xavier", got \'zeros\''),
        ({"pixel_initialization": "zeros"}, 'pixel_initialization must be "normal" or "xavier", got \'zeros\''),
        ({"mask_token_id": 300}, r"mask_token_id must be in \[0, 300\), got 300"),
        ({"mask_token_id": -1}, r"mask_token_id must be in \[0, 300\), got -1"),
        ({"image_mask_ratio": 0.1}, "image_mask_ratio must hide 1 to 4 of 4 blocks, got 0.1"),
        ({"image_mask_ratio": 1.2}, "image_mask_ratio must hide 1 to 4 of 4 blocks, got 1.2"),
        ({"text_mask_ratio": 1.5}, r"text_mask_ratio must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, r"temperature must be in \[0.001, 0.5\], got 0.0"),
        ({"image_mask_ratio": math.nan}, "image_mask_ratio must be a finite number, got nan"),
        ({"image_mean": (0.5, math.inf, 0.5)}, "image_mean must be a finite number, got inf"),
        ({"image_std": (0.5, 0.0, 0.5)}, r"image_std must be above 0, got \(0.5, 0.0, 0.5\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        micro_config(**changes)


# Named one by one: a setting that is forgotten here is no less a number.
NUMBERS = (
    *("lr_encoder", "lr_cross", "lr_pixels", "lr_end", "weight_decay", "beta2", "clip_norm", "flip", "color_jitter"),
    *("ema_decay", "eval_every_minutes", "checkpoint_every_minutes", "stall_minutes"),
)
NOT_NEGATIVE = (
    *("lr_encoder", "lr_cross", "lr_pixels", "lr_end", "weight_decay", "warmup_steps", "reconstruction_first"),
    *("eval_every_steps", "eval_every_minutes", "eval_images", "checkpoint_every_steps", "checkpoint_every_minutes"),
    *("keep_every_steps", "max_bad_steps"),
)


def test_every_setting_that_is_a_number_is_looked_at():
    floats = {name for name, kind in get_type_hints(PretrainConfig).items() if kind is float}
    assert floats == set(NUMBERS)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_a_seed_may_be_any_that_torch_takes(seed):
    torch.Generator().manual_seed(pretrain_config(Path("data"), Path("out"), seed=seed).seed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be 0 < smallest <= largest <= 1"),
        ({"crop_scale": (0.9, 0.8)}, "crop_scale must be 0 < smallest <= largest <= 1"),
        ({"crop_scale": (0.9, 1.1)}, "crop_scale must be 0 < smallest <= largest <= 1"),
        ({"beta2": 1.5}, r"beta2 must be in \[0, 1\), got 1.5"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0, got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
        ({"stall_minutes": 0.0}, "stall_minutes must be above 0, got 0.0"),
        ({"seed": 99999999999999999999}, r"seed must be in \[-2\^63, 2\^64\), got 99999999999999999999"),
        ({"seed": -(2**63) - 1}, r"seed must be in \[-2\^63, 2\^64\), got -9223372036854775809"),
        *(({name: math.nan}, f"{name} must be a finite number, got nan") for name in NUMBERS),
        *(({name: math.inf}, f"{name} must be a finite number, got inf") for name in NUMBERS),
        ({"crop_scale": (0.5, math.nan)}, "crop_scale must be a finite number, got nan"),
        *(({name: -1}, f"{name} must be at least 0, got -1") for name in NOT_NEGATIVE),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrain_config(Path("data"), Path("out"), **changes)


def test_a_model_configuration_goes_through_json_and_back():
    config = micro_config(cross_norm="pre", image_mask_ratio=0.5)
    values = json.loads(json.dumps(config.to_dict()))
    assert model_config(values, "model.json") == config
    assert values["image_mean"] == [0.5, 0.4, 0.3]


def test_an_unknown_setting_is_answered_with_the_nearest():
    values = micro_config().to_dict()
    with pytest.raises(ConfigError, match=r"^model.json: unknown model setting 'widht'; did you mean width\?$"):
        model_config(values | {"widht": 3}, "model.json")
    with pytest.raises(ConfigError, match=r"^model.json: unknown model setting 'zzz'$"):
        model_config(values | {"zzz": 3}, "model.json")
    with pytest.raises(ConfigError, match="heads must divide width"):
        model_config(values | {"heads": 5}, "model.json")


def test_a_recipe_becomes_plain_values():
    config = pretrain_config(Path("data"), Path("out"), tokenizer=Path("t.json"))
    assert isinstance(config, PretrainConfig)
    values = json.loads(json.dumps(config.to_dict()))
    assert (values["data"], values["out"], values["tokenizer"]) == ("data", "out", "t.json")
    assert values["model"]["width"] == 16
    assert values["crop_scale"] == [0.5, 1.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_runs_configuration_comes_back(preset):
    config = pretrain_defaults(preset, Path("data"), Path("run"))
    again = run_config({"format_version": 2, **json.loads(json.dumps(config.to_dict()))}, "config.json")
    assert again == config
    assert isinstance(again.data, Path)
    assert isinstance(again.crop_scale, tuple)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bacth_size": 3}, "config.json: unknown setting 'bacth_size'; did you mean batch_size?"),
        ({"model": {"widht": 3}}, "config.json: unknown model setting 'widht'; did you mean width?"),
        ({"max_steps": "ten"}, "config.json: max_steps: wanted int, got 'ten'"),
        ({"max_steps": 1.5}, "config.json: max_steps: wanted int, got 1.5"),
        ({"max_steps": True}, "config.json: max_steps: wanted int, got True"),
        ({"lr_cross": "3e-4"}, "config.json: lr_cross: wanted float, got '3e-4'"),
        ({"resume": 1}, "config.json: resume: wanted bool, got 1"),
        ({"data": None}, "config.json: data: wanted Path, got None"),
        ({"crop_scale": [0.5]}, "config.json: crop_scale: wanted tuple[float, float], got [0.5]"),
        ({"precision": "fp8"}, "config.json: precision: wanted Literal['auto', 'bf16', 'fp32'], got 'fp8'"),
        ({"model": [1]}, "config.json: wanted the model settings as a JSON object, got [1]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_cannot_be(change, message):
    values = json.loads(json.dumps(pretrain_defaults("tiny", Path("data"), Path("run")).to_dict()))
    with pytest.raises(ConfigError) as caught:
        run_config(values | change, "config.json")
    assert str(caught.value) == message


def test_a_configuration_that_lacks_something():
    values = json.loads(json.dumps(pretrain_defaults("tiny", Path("data"), Path("run")).to_dict()))
    del values["out"], values["max_steps"]
    with pytest.raises(ConfigError, match=r"config.json: wanted the settings out, max_steps, found none"):
        run_config(values, "config.json")
