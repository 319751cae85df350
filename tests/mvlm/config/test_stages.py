"""Stages of a run, of different sides of images: their form, and the settings of the model in each."""

import json

import pytest

from mvlm.config.json_files import config_json, run_config
from mvlm.errors import ConfigError
from support.models import micro_config, pretrain_config


def test_each_step_has_the_settings_of_its_stage(tmp_path):
    config = pretrain_config(tmp_path, tmp_path / "run", max_steps=9, stages=("0:64:0.75", "3:16", "5:32:0.5"))
    found = [config.model_at(step) for step in range(9)]
    assert [model.image_size for model in found] == [64] * 3 + [16] * 2 + [32] * 4
    assert [model.image_mask_ratio for model in found] == [0.75] * 3 + [0.6] * 2 + [0.5] * 4
    assert {model.width for model in found} == {config.model.width}
    again = run_config(json.loads(json.dumps(config_json(config))), "config.json")
    assert [again.model_at(step) for step in range(9)] == found
    alone = pretrain_config(tmp_path, tmp_path / "run")
    assert alone.model_at(1) is alone.model


@pytest.mark.parametrize(
    "stages, said",
    [
        (("0:24", "4:32"), "such as 16 or 32, got 24"),
        (("0:8", "4:32"), "such as 16 or 32, got 8"),
        (("0:0", "4:32"), "multiple"),
        (("2:16", "4:32"), "ascend from 0, got 2, 4"),
        (("0:16", "4:32", "4:32"), "ascend from 0"),
        (("0:16", "9:32"), "before the end of the run, 9, got 9"),
        (("0:32", "4:16"), "model.image_size 32 in the last one, got 16"),
        (("0:16:0.1", "4:32"), "must hide 1 to 1 of 1 blocks"),
        (("0:16:1.5", "4:32"), "STEP:SIDE:MASKED"),
        (("16", "4:32"), "STEP:SIDE"),
        (("0:-16", "4:32"), "STEP:SIDE"),
    ],
    ids=str,
)
def test_other_stages_are_refused_in_one_line(tmp_path, stages, said):
    with pytest.raises(ConfigError, match=said) as refused:
        pretrain_config(tmp_path, tmp_path / "run", max_steps=9, stages=stages)
    assert str(refused.value).startswith("stages: ")
    assert "\n" not in str(refused.value)


def test_stages_of_a_tower_are_refused(tmp_path):
    tower = micro_config(image_tower="timm:test_vit")
    with pytest.raises(ConfigError, match="stages: wanted none with an image_tower"):
        pretrain_config(tmp_path, tmp_path / "run", model=tower, stages=("0:16", "1:32"))
