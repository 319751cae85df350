"""Configurations of models and runs as JSON."""

import json
import re
from pathlib import Path

import pytest

from mvlm.config.json_files import config_json, read_config, run_config
from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError, RunError


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_configuration_survives_json(preset):
    model = MaskVLMConfig.preset(preset, image_mean=(0.5, 0.4, 0.3))
    config = PretrainConfig.preset(preset, data=Path("data"), out=Path("run"), model=model)
    again = run_config(json.loads(json.dumps(config_json(config))), "config.json")
    assert again == config
    assert isinstance(again.data, Path)
    assert isinstance(again.crop_scale, tuple)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"bacth_size": 3}, "did you mean batch_size"),
        ({"model": {"widht": 3}}, "did you mean width"),
        *(({"max_steps": value}, "max_steps: wanted int") for value in ("ten", 1.5, True)),
        ({"lr_cross": "3e-4"}, "lr_cross: wanted float"),
        ({"resume": 1}, "resume: wanted bool"),
        ({"data": None}, "data: wanted Path"),
        ({"crop_scale": [0.5]}, "crop_scale"),
        ({"precision": "fp8"}, "precision"),
        ({"model": [1]}, "model"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_an_invalid_run_configuration_is_refused(change, name):
    values = json.loads(json.dumps(PretrainConfig.preset("tiny", data=Path("data"), out=Path("run")).to_dict()))
    with pytest.raises(ConfigError, match=rf"^config.json: .*{name}"):
        run_config(values | change, "config.json")


def test_a_run_configuration_without_required_settings_is_refused():
    values = json.loads(json.dumps(PretrainConfig.preset("tiny", data=Path("data"), out=Path("run")).to_dict()))
    del values["out"], values["max_steps"]
    with pytest.raises(ConfigError, match=r"config.json: wanted the settings out, max_steps, found none"):
        run_config(values, "config.json")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "wanted the configuration of a run, could not read it"),
        ("{", "wanted the configuration of a run, found no JSON"),
        pytest.param("[" * 100_000, "wanted the configuration of a run, found", id="deep"),
        ("[1]", "wanted the configuration of a run, found expected object"),
        ('{"width": 192}', "wanted the configuration of a run, found object missing required field format_version"),
        ('{"format_version": 1}', "wanted a configuration of version 2 or 3, got version 1"),
    ],
)
def test_a_file_without_a_run_configuration_is_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RunError, match=f"^{re.escape(f'{file}: {message}')}"):
        read_config(file)
