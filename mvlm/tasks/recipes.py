"""Recipes of `mvlm finetune TASK`. `PretrainConfig.preset` has those of pretraining."""

from pathlib import Path
from typing import Any

from mvlm.config.finetune import FinetuneConfig
from mvlm.errors import ConfigError
from mvlm.tasks import stated

FINETUNE_RECIPES = ("tiny", "base")
"""Recipes of `mvlm finetune TASK`: for a `tiny` model on two CPU cores, and for one of the paper's size on GPUs."""


def finetune_defaults(task: str, checkpoint: Path, data: Path, out: Path, recipe: str = "tiny") -> FinetuneConfig:
    """Configuration of fine-tuning by a recipe, for a pretrained model, shards in `data` and a run folder `out`.

    In the recipe `base`, settings that differ between tasks come from `Task.recipe`. Its steps make ALBEF's number of
    passes over the published training split in batches of 256, as the paper gives none. Flips are off where texts say
    left and right. RandAugment is off, because ALBEF leaves its colour operations out.

    ConfigError for an unknown recipe.
    """
    shared: dict[str, Any] = {"task": task, "checkpoint": checkpoint, "data": data, "out": out}
    shared |= {"lr_end": 0.0}
    if recipe == "tiny":
        return FinetuneConfig(
            max_steps=1200,
            warmup_steps=120,
            batch_size=64,
            lr_encoder=2e-4,
            lr_cross=3e-4,
            lr_head=1e-3,
            crop_scale=(0.8, 1.0),
            **shared,
        )
    if recipe != "base":
        raise ConfigError(f"unknown recipe: wanted one of {', '.join(FINETUNE_RECIPES)}, got {recipe!r}")
    values: dict[str, Any] = {"max_steps": 10_000, "lr_cross": 2e-5, **stated(task, "recipe")}
    return FinetuneConfig(
        warmup_steps=values["max_steps"] // 10,
        batch_size=256,
        lr_encoder=1e-5,
        lr_head=1e-4,
        crop_scale=(0.5, 1.0),
        image_size=384,
        question_length=40,
        **shared,
        **values,
    )
