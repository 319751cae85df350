"""The recipes of the presets."""

import json
from functools import partial
from pathlib import Path

import pytest

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import RECIPES, PretrainConfig, suggested_preset
from mvlm.errors import ConfigError
from mvlm.tasks import task_names
from mvlm.tasks.recipes import FINETUNE_RECIPES, finetune_defaults


@pytest.mark.parametrize("preset", [*PRESETS, "clip-3m", "clip-12m", "clip-400m"])
def test_every_preset_has_a_recipe(preset):
    config = PretrainConfig.preset(preset, data=Path("data"), out=Path("run"), seed=3)
    assert config.model == MaskVLMConfig.preset(preset if preset in PRESETS else "base")
    assert (config.data, config.out, config.seed) == (Path("data"), Path("run"), 3)
    assert config.warmup_steps < config.max_steps
    assert json.loads(json.dumps(config.to_dict()))["data"] == "data"


@pytest.mark.parametrize("make", [MaskVLMConfig.preset, partial(PretrainConfig.preset, data=Path("d"), out=Path("o"))])
def test_an_unknown_preset_is_refused_with_a_list_of_presets(make):
    with pytest.raises(ConfigError, match=r"unknown preset: wanted one of tiny, small, base.*, got 'huge'"):
        make("huge")


# As published: https://github.com/facebookresearch/SLIP (README.md, main.py) and, for LAION-400M,
# https://github.com/LAION-AI/scaling-laws-openclip (trained_models_info.csv) and open_clip's defaults.
PUBLISHED = {  # pairs, epochs, batch of all GPUs, warm-up in steps or None for an epoch, rate, last rate, decay, crops
    "clip-3m": (3e6, 40, 64 * 64, None, 5e-4, 1e-5, 0.5, (0.5, 1.0)),
    "clip-12m": (10_968_539, 35, 64 * 64, None, 5e-4, 1e-5, 0.5, (0.5, 1.0)),
    "clip-400m": (407_332_084, 32, 176 * 192, 10_000, 5e-4, 0.0, 0.2, (0.9, 1.0)),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_recipe_of_contrastive_training_has_the_published_values(preset):
    pairs, epochs, batch, warm_up, rate, last, decay, crops = PUBLISHED[preset]
    run = PretrainConfig.preset(preset, data=Path("data"), out=Path("run"))
    assert run.max_steps == pytest.approx(epochs * pairs / batch, rel=1e-3)
    assert run.warmup_steps == pytest.approx(pairs / batch if warm_up is None else warm_up, rel=5e-3)
    assert run.lr_encoder * run.lr_end == pytest.approx(last)
    assert (run.batch_size, run.lr_encoder, run.weight_decay, run.crop_scale) == (batch, rate, decay, crops)
    assert (run.beta2, run.optimizer, run.schedule, run.randaugment, run.flip) == (0.98, "adamw", "cosine", 0, 0)


def test_a_preset_is_suggested_for_every_number_of_pairs():
    suggested = [suggested_preset(pairs) for pairs in (1, 3_165, 10**6, 3_000_000, 11_000_000, 80_000_000, 10**10)]
    assert suggested == ["tiny", "tiny", "base", "clip-3m", "clip-12m", "clip-400m", "clip-400m"]
    assert {recipe.model for recipe in RECIPES.values()} == set(PRESETS)


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
