"""The recipes of the presets."""

import json
from functools import partial
from pathlib import Path

import pytest

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.tasks import task_names
from mvlm.tasks.recipes import FINETUNE_RECIPES, finetune_defaults


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_recipe(preset):
    config = PretrainConfig.preset(preset, data=Path("data"), out=Path("run"), seed=3)
    assert config.model == MaskVLMConfig.preset(preset)
    assert (config.data, config.out, config.seed) == (Path("data"), Path("run"), 3)
    assert config.warmup_steps < config.max_steps
    assert json.loads(json.dumps(config.to_dict()))["data"] == "data"


@pytest.mark.parametrize("make", [MaskVLMConfig.preset, partial(PretrainConfig.preset, data=Path("d"), out=Path("o"))])
def test_an_unknown_preset_is_refused_with_a_list_of_presets(make):
    with pytest.raises(ConfigError, match="unknown preset: wanted one of tiny, small, base, got 'huge'"):
        make("huge")


@pytest.mark.parametrize("recipe", FINETUNE_RECIPES)
@pytest.mark.parametrize("task", [*task_names(), "own.py"])
def test_every_task_has_each_recipe(task, recipe):
    config = finetune_defaults(task, Path("model"), Path("data"), Path("run"), recipe)
    assert 10 * config.warmup_steps == config.max_steps
    assert 0 < config.lr_encoder <= config.lr_cross <= config.lr_head
    assert json.loads(json.dumps(config.to_dict()))["task"] == task
    if task in ("vqa", "pairs"):  # their texts say left and right
        assert config.flip == 0
    if recipe == "base":
        assert (config.image_size, config.question_length, config.batch_size) == (384, 40, 256)


def test_steps_of_the_base_recipe_are_passes_over_the_published_split():
    """Samples of the training splits as published, and passes as ALBEF fine-tunes."""
    published = {
        "vqa": (443_757, 8), "entailment": (529_527, 5), "retrieval": (145_000, 10), "pairs": (86_373, 10),
        "caption": (566_747, 5),
    }  # fmt: skip
    for task, (samples, passes) in published.items():
        config = finetune_defaults(task, Path("model"), Path("data"), Path("run"), "base")
        assert config.max_steps * 256 == pytest.approx(samples * passes, rel=0.01)


def test_a_task_of_the_users_states_its_settings_of_the_base_recipe(tmp_path):
    """The task's file is read and not run."""
    file = tmp_path / "own.py"
    file.write_text(
        'raise SystemExit\nclass Own:\n    name = "own"\n    recipe: ClassVar = {"flip": 0.25, "rerank": 7}\n'
    )
    tiny, base = (finetune_defaults(str(file), Path("m"), Path("d"), Path("r"), name) for name in FINETUNE_RECIPES)
    assert (tiny.flip, base.flip, base.rerank, base.max_steps) == (0, 0.25, 7, 10_000)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="unknown recipe: wanted one of tiny, base, got 'huge'"):
        finetune_defaults("vqa", Path("model"), Path("data"), Path("run"), "huge")
