"""The file of a study: what it may say, and the configuration of its trials."""

import re
from pathlib import Path

import pytest

from mvlm.errors import ConfigError
from mvlm.studies.study import merged, read_study, slug, trial_config

GOOD = """
question = "Does it?"
preset = "tiny"
base = "all"
seeds = [3, 5]
measures = ["ir.r1"]
budget = {steps = 7}

[settings]
batch_size = 16
[settings.model]
width = 96

[arms.all]
[arms."no pixels"]
mim_weight = 0.0
[arms."narrow text"]
model = {text_mask_ratio = 0.15}
[arms.again]
seed = 100
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "objectives.toml"
    file.write_text(text)
    return file


def test_an_arm_differs_from_the_study_in_its_settings_alone(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    assert (study.name, study.seeds, study.split) == ("objectives", [3, 5], "test")
    configs = {arm: trial_config(study, arm, 3, Path("data"), Path("out"), 7) for arm in study.arms}
    base = configs["all"]
    assert (base.batch_size, base.model.width, base.max_steps, base.seed) == (16, 96, 7, 3)
    changed = {arm: {k: v for k, v in c.to_dict().items() if v != base.to_dict()[k]} for arm, c in configs.items()}
    assert changed["no pixels"] == {"mim_weight": 0.0}
    assert changed["narrow text"]["model"] == base.model.to_dict() | {"text_mask_ratio": 0.15}
    assert changed["again"] == {"seed": 103}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("question", "quest", "unknown name 'quest'"),
        ('base = "all"', 'base = "none"', "base: wanted one of the arms all, "),
        ("seeds = [3, 5]", "seeds = [3, 3]", "seeds: wanted different integers"),
        ("seeds = [3, 5]", "seeds = 3", "seeds: wanted a list, got 3"),
        ("steps = 7", "hours = 7", "budget: wanted {steps = N} or {flops = N}, got {'hours': 7}"),
        ("steps = 7", "steps = 0", "budget: wanted"),
        ("steps = 7", 'steps = "7"', "budget: wanted"),
        ("[arms.again]", "[arms.All]", "arms: wanted names that differ"),
        ("batch_size = 16", "max_steps = 16", "max_steps: wanted no such setting, the study sets it"),
        ("batch_size = 16", "seed = 16", "seed: wanted no such setting, the study sets it"),
        ("seed = 100", "seed = ", "wanted a study as TOML"),
        ('measures = ["ir.r1"]', "", "wanted measures, found none"),
    ],
)
def test_a_wrong_study_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        read_study(write(tmp_path, GOOD.replace(old, new)))
    assert message in str(error.value)
    assert "objectives.toml" in str(error.value)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("mim_weight", "mim_wait", "arm no pixels: unknown setting 'mim_wait'; did you mean mim_weight?"),
        ("mim_weight = 0.0", "mim_weight = -1.0", "mim_weight"),
        ("text_mask_ratio", "text_ratio", "unknown model setting 'text_ratio'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_arm(tmp_path: Path, old: str, new: str, message: str) -> None:
    study = read_study(write(tmp_path, GOOD.replace(old, new)))
    arm = "narrow text" if "text" in old else "no pixels"
    with pytest.raises(ConfigError, match=re.escape(message)):
        trial_config(study, arm, 3, Path("data"), Path("out"), 7)


def test_a_study_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "im.png").write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(ConfigError, match=r"im\.png: wanted a study as TOML, found no text; name a TOML file"):
        read_study(tmp_path / "im.png")


def test_a_missing_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: wanted a study, could not read it"):
        read_study(tmp_path / "none.toml")


def test_tables_merge_at_every_depth() -> None:
    below, above = {"a": 1, "model": {"width": 4, "heads": 2}}, {"model": {"heads": 1}, "b": 2}
    assert merged(below, above) == {"a": 1, "b": 2, "model": {"width": 4, "heads": 1}}
    assert below["model"] == {"width": 4, "heads": 2}


def test_the_folder_of_an_arm_is_made_of_its_letters_and_digits() -> None:
    assert slug("ITC + ITM, 0.6 / 0.3") == "itc-itm-0.6-0.3"
