"""The recipes of the presets."""

import json
from pathlib import Path

import pytest

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.recipes import pretrain_defaults
from mvlm.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_recipe(preset):
    config = pretrain_defaults(preset, Path("data"), Path("run"))
    assert config.model == MaskVLMConfig.preset(preset)
    assert (config.data, config.out) == (Path("data"), Path("run"))
    assert config.warmup_steps < config.max_steps
    assert json.loads(json.dumps(config.to_dict()))["data"] == "data"


@pytest.mark.parametrize("make", [MaskVLMConfig.preset, lambda name: pretrain_defaults(name, Path("d"), Path("o"))])
def test_an_unknown_preset_is_refused_with_a_list_of_presets(make):
    with pytest.raises(ConfigError, match="unknown preset: wanted one of tiny, small, base, got 'huge'"):
        make("huge")
