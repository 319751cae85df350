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
        ({"batch_size": 0}, "config.json: batch_size must be at least 1, got 0"),
    ],
)
def test_an_invalid_run_configuration_is_refused(change, message):
    values = json.loads(json.dumps(PretrainConfig.preset("tiny", data=Path("data"), out=Path("run")).to_dict()))
    with pytest.raises(ConfigError) as caught:
        run_config(values | change, "config.json")
    assert str(caught.value) == message


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
        ("[1]", "wanted the configuration of a run, found no JSON"),
        ('{"width": 192}', "wanted the configuration of a run, found no JSON"),
        ('{"format_version": 1}', "wanted a configuration of version 2 or 3, got version 1"),
    ],
)
def test_a_file_without_a_run_configuration_is_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RunError, match=f"^{re.escape(f'{file}: {message}')}"):
        read_config(file)
