"""Settings that are gone, in files and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.json_files import REMOVED, config_json, model_config, read_config, run_config, without_removed
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.runs.resume import open_run
from support.commands import assert_refused
from support.models import micro_config, pretrain_config
from support.questions import finetune_config


def with_setting(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Values of a config.json with one more setting, of the run or of the model."""
    model, _, setting = name.rpartition(".")
    return values | ({"model": values["model"] | {setting: value}} if model else {name: value})


def another(value: Any) -> Any:
    """A value that is not `value`."""
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "another"


def old_run(folder: Path, name: str, value: Any) -> PretrainConfig:
    """Write the config.json of a run that had a setting; its settings without that one, to resume it."""
    config = pretrain_config(folder / "data", folder / "run", model=micro_config(), resume=True)
    config.out.mkdir(parents=True)
    (config.out / "config.json").write_text(json.dumps(with_setting(config_json(config), name, value)))
    return config


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_read_at_its_default_or_if_a_resume_sets_it(name, tmp_path):
    default = REMOVED[name].default
    for number, value in enumerate([default, another(default)] if REMOVED[name].free else [default]):
        config = old_run(tmp_path / str(number), name, value)
        file = config.out / "config.json"
        assert read_config(file) == config_json(config)
        assert run_config(json.loads(file.read_text()), str(file)) == config
        assert open_run(config) is None  # a run that made no checkpoint starts again


@pytest.mark.parametrize("name", [name for name, gone in REMOVED.items() if not gone.free])
def test_a_file_with_a_removed_setting_at_another_value_is_refused(name, tmp_path):
    config = old_run(tmp_path, name, another(REMOVED[name].default))
    file = config.out / "config.json"
    values = json.loads(file.read_text())
    calls = [lambda: run_config(values, str(file)), lambda: open_run(config)]
    calls += [lambda: model_config(values["model"], str(file))] if "." in name else []
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{file}: {name}: ")
        assert f"mvlm {REMOVED[name].last} " in message
        assert "\n" not in message


@pytest.mark.parametrize("name", REMOVED)
def test_the_flag_of_a_removed_setting_is_refused(name, run_mvlm):
    flag = f"--{name.replace('_', '-')}"
    for words in (["pretrain", "tiny", flag, "1"], ["finetune", "vqa", f"{flag}=1"], ["finetune", "vqa", f"--{name}"]):
        assert_refused(run_mvlm(*words), f"{flag} is gone: mvlm {REMOVED[name].last} is the last version")


@pytest.mark.parametrize("image, text", [(0.5, 0.3), (0.5, 0.0), (0.2, 0.1)])
def test_partners_masked_as_the_inputs_are_mask_partner(image, text):
    values = micro_config(image_mask_ratio=0.5, text_mask_ratio=0.3).to_dict()
    del values["mask_partner"]
    values |= {"partner_image_mask_ratio": image, "partner_text_mask_ratio": text}
    if (image, text) == (0.5, 0.3):
        assert model_config(values, "model.json") == micro_config(image_mask_ratio=0.5, mask_partner=True)
        flat = {f"model.{name}": value for name, value in values.items()}
        assert without_removed(flat) == {f"model.{k}": v for k, v in without_removed(values, "model.").items()}
        return
    with pytest.raises(ConfigError, match=r"model\.partner_image_mask_ratio: .* mvlm 0\.2\.0 is the last"):
        model_config(values, "model.json")


@pytest.mark.parametrize(
    "old, new",
    [
        ({"wandb": False, "trackio": False}, {"log_to": []}),
        ({"wandb": True, "trackio": True}, {"log_to": ["wandb", "trackio"]}),
        ({"wandb": False, "trackio": True}, {"log_to": ["trackio"]}),
        ({"compile": False, "cuda_graphs": False}, {"capture": "none"}),
        ({"compile": True, "cuda_graphs": False}, {"capture": "compile"}),
        ({"compile": False, "cuda_graphs": True}, {"capture": "cuda-graphs"}),
    ],
)
def test_two_settings_that_became_one_are_read(old, new, tmp_path):
    config = pretrain_config(tmp_path / "data", tmp_path / "run", model=micro_config())
    values = {name: value for name, value in config_json(config).items() if name not in new} | old
    assert without_removed(values) == config_json(config) | new
    assert config_json(run_config(values, "config.json")) == config_json(config) | new


@pytest.mark.parametrize(
    "old, frozen", [("none", ()), ("encoders", ("image", "text")), ("all", ("image", "text", "cross"))]
)
def test_freeze_became_a_setting_for_each_part(old, frozen, tmp_path, run_mvlm):
    parts = {f"train_{part}": "frozen" for part in frozen}
    config = finetune_config(tmp_path / "first", tmp_path / "data", tmp_path / "run", **parts)
    values = {name: value for name, value in config_json(config).items() if not name.startswith("train_")}
    assert run_config(values | {"freeze": old}, "config.json", FinetuneConfig) == config
    assert_refused(run_mvlm("finetune", "vqa", "--freeze", old), "--freeze is now --train-image frozen")


def test_the_file_of_a_fine_tuning_run_may_have_what_it_never_read(tmp_path):
    config = finetune_config(tmp_path / "first", tmp_path / "data", tmp_path / "run")
    alone = {
        "mlm_weight": 1.0, "mim_weight": 1.0, "itc_weight": 1.0, "itm_weight": 1.0, "lr_pixels": 0.0, "tokenizer": None,
        "optimizer": "adamw", "lr_muon": 0.01, "initial_model": None, "image_weights": None, "text_weights": None,
        "compile": False, "cuda_graphs": False,
    }  # fmt: skip
    values = config_json(config) | alone
    assert run_config(values, "config.json", FinetuneConfig) == config
    assert without_removed(values) == config_json(config)
    for name in ("lr_pixels", "mlm_weight"):
        with pytest.raises(ConfigError, match=name):
            run_config(values | {name: 0.5}, "config.json", FinetuneConfig)
