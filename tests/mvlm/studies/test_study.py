"""The file of a study: what it may say, and the configuration of its trials."""

from pathlib import Path
from typing import Any

import pytest

from mvlm.errors import ConfigError
from mvlm.studies.study import read_study, trial_config

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


def _configurations(file: Path) -> dict[str, Any]:
    study = read_study(file)
    return {arm: trial_config(study, arm, 3, Path("data"), Path("out"), 7) for arm in study.arms}


def test_an_arm_differs_from_the_study_in_its_settings_alone(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    assert (study.name, study.seeds, study.split) == ("objectives", [3, 5], "test")
    configs = _configurations(write(tmp_path, GOOD))
    base = configs["all"]
    assert (base.batch_size, base.model.width, base.max_steps, base.seed) == (16, 96, 7, 3)
    changed = {arm: {k: v for k, v in c.to_dict().items() if v != base.to_dict()[k]} for arm, c in configs.items()}
    assert changed["no pixels"] == {"mim_weight": 0.0}
    assert changed["narrow text"]["model"] == base.model.to_dict() | {"text_mask_ratio": 0.15}
    assert changed["again"] == {"seed": 103}


CHANGES = (  # old text, new text, what is refused
    ("question", "quest", "unknown name 'quest'"),
    ('base = "all"', 'base = "none"', "base: "),
    ("seeds = [3, 5]", "seeds = [3, 3]", "seeds: "),
    ("seeds = [3, 5]", "seeds = 3", "seeds: "),
    ("steps = 7", "hours = 7", "budget: "),
    ("steps = 7", "steps = 0", "budget: "),
    ("steps = 7", 'steps = "7"', "budget: "),
    ("[arms.again]", "[arms.All]", "arms: "),
    ("batch_size = 16", "max_steps = 16", "max_steps: "),
    ("batch_size = 16", "seed = 16", "seed: "),
    ("seed = 100", "fraction = 1.5", "arms.again: fraction: "),
    ("seed = 100", 'against = "none"', "arms.again: against: "),
    ("seed = 100", "budget = {hours = 7}", "arms.again: budget: "),
    ("seed = 100", 'budget = {flops_of = "none"}', "arms.again: budget: "),
    ("seed = 100", 'budget = {flops_of = "again"}', "arms.again: budget: "),
    ("seed = 100", 'budget = {seconds_of = "again"}', "arms.again: budget: "),
    ("seed = 100", 'budget = {flops_of = "all", seconds_of = "all"}', "arms.again: budget: "),
    ("seed = 100", "seed = ", "wanted a study as TOML"),
    ('measures = ["ir.r1"]', "", "wanted measures, found none"),
    ("mim_weight", "mim_wait", "arm no pixels: unknown setting 'mim_wait'; did you mean mim_weight?"),
    ("mim_weight = 0.0", "mim_weight = -1.0", "arm no pixels: mim_weight"),
    (
        "mim_weight = 0.0",
        "image_mask_ratio = 0.8",
        "arm no pixels: unknown setting 'image_mask_ratio'; did you mean model.image_mask_ratio?",
    ),
    ("text_mask_ratio = 0.15", "batch_size = 8", "'batch_size'; it is a setting of the run, not of the model"),
    ("text_mask_ratio = 0.15", "image_mask_ratio = 1.4", "arm narrow text: image_mask_ratio"),
    ("text_mask_ratio", "text_ratio", "arm narrow text: unknown model setting 'text_ratio'"),
)


@pytest.mark.parametrize("old, new, message", CHANGES)
def test_a_wrong_study_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as error:
        _configurations(file)
    assert message in str(error.value)
    assert "objectives" in str(error.value)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "im.png").write_bytes(b"\x89PNG\r\n\xff")
    for name in ("im.png", "none.toml"):
        with pytest.raises(ConfigError, match=f"{name}: wanted a study"):
            read_study(tmp_path / name)
