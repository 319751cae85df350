"""Configuration of a pretraining run: the settings of every run, those of pretraining alone, and recipes."""

from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from mvlm.config.groups import (
    CaptureSettings,
    ClassesSettings,
    ForgettingSettings,
    MuonSettings,
    ObjectiveSettings,
    RunConfig,
    StageSettings,
    WeightSettings,
)
from mvlm.config.model import MaskVLMConfig
from mvlm.config.stages import Stage, parse_stages
from mvlm.errors import ConfigError

# Chosen on two CPU cores, with images of 64 pixels, for a run of five minutes. docs/evidence/lab_log.md has the other
# trials.
_TINY: dict[str, Any] = {
    "max_steps": 550,
    "batch_size": 128,
    "optimizer": "muon",
    "lr_encoder": 7e-4,
    "lr_cross": 7e-4,
    "lr_pixels": 4e-4,
    "lr_end": 0.01,
    "warmup_steps": 40,
    "crop_scale": (0.9, 1.0),
}
# The paper's: 512 pairs, a learning rate of 3e-4 that falls to 3e-5 after a warm-up. The encoders have the same rate as
# the rest, because they start from scratch here.
_PAPER: dict[str, Any] = {
    "max_steps": 100_000,
    "batch_size": 512,
    "lr_encoder": 3e-4,
    "lr_cross": 3e-4,
    "lr_pixels": 3e-4,
    "warmup_steps": 5_000,
    "crop_scale": (0.2, 1.0),
    "randaugment": 2,
}
# Published recipes of contrastive pretraining; docs/guides/training.md has the sources. The modules that CLIP does not
# have get the rate of the encoders, which nobody has tried. CC3M and CC12M: CLIP with ViT-B/16 of the authors of SLIP,
# 40 and 35 epochs, the first one warm-up.
_CC3M: dict[str, Any] = {
    "max_steps": 29_300,
    "batch_size": 4_096,
    "lr_encoder": 5e-4,
    "lr_cross": 5e-4,
    "lr_pixels": 5e-4,
    "lr_end": 0.02,
    "warmup_steps": 730,
    "weight_decay": 0.5,
    "crop_scale": (0.5, 1.0),
}
_CC12M = {**_CC3M, "max_steps": 93_700, "warmup_steps": 2_680}
# LAION-400M: ViT-B/16 of open_clip, 32 epochs.
_LAION_400M = {
    **_CC3M,
    "max_steps": 385_700,
    "batch_size": 33_792,
    "lr_end": 0.0,
    "warmup_steps": 10_000,
    "weight_decay": 0.2,
    "crop_scale": (0.9, 1.0),
}


class Recipe(NamedTuple):
    """Recipe of pretraining: a preset of the model, settings of the run, and the number of pairs that it suits."""

    model: str
    """Preset of the model."""
    settings: dict[str, Any]
    """Settings of a run that differ from their defaults, or have none."""
    most_pairs: float = 0
    """Most training pairs for which it is suggested; 0 for never."""


RECIPES = {
    "tiny": Recipe("tiny", _TINY, 100_000),
    "small": Recipe("small", _PAPER),
    "base": Recipe("base", _PAPER, 1_000_000),
    "clip-3m": Recipe("base", _CC3M, 6_000_000),
    "clip-12m": Recipe("base", _CC12M, 70_000_000),
    "clip-400m": Recipe("base", _LAION_400M, inf),
}
"""Recipes of pretraining by preset, for ascending numbers of pairs. The last three are for about as many pairs as their
names say; the limits between them are geometric means."""


def recipe_of(preset: str) -> Recipe:
    """The recipe of a preset. ConfigError for an unknown one."""
    if preset not in RECIPES:
        raise ConfigError(f"unknown preset: wanted one of {', '.join(RECIPES)}, got {preset!r}")
    return RECIPES[preset]


def suggested_preset(pairs: int) -> str:
    """Name of the preset that suits a number of training pairs."""
    return next(name for name, recipe in RECIPES.items() if pairs <= recipe.most_pairs)


STARTS = {
    "image": ("image_weights", "initial_model"),
    "text": ("text_weights", "text_tower", "initial_model"),
    "cross": ("initial_model",),
}
"""For each part of the model, the settings that name pretrained weights for it."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(
    CaptureSettings,
    StageSettings,
    ClassesSettings,
    ForgettingSettings,
    WeightSettings,
    MuonSettings,
    ObjectiveSettings,
    RunConfig,
):
    """Configuration of a pretraining run. ConfigError for invalid settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages and self.model.image_tower:
            raise ConfigError(f"stages: wanted none with an image_tower, got {' '.join(self.stages)}; leave them out")
        parse_stages(self.stages, self.model, self.max_steps)
        if self.classes is not None and not self.eval_every_steps:
            raise ConfigError("classes: wanted --eval-every-steps, at which they are classified, got none; give it")
        if self.templates is not None and self.classes is None:
            raise ConfigError("templates: wanted --classes, whose names they take, got none; give it")
        if self.capture != "none" and self.plan != "fast":
            raise ConfigError(
                f"capture: wanted --plan fast with {self.capture}, got {self.plan}; leave one of them out"
            )
        if self.capture == "cuda-graphs" and self.accumulate > 1:
            raise ConfigError(
                f"capture: wanted --accumulate 1 with cuda-graphs, got {self.accumulate}; leave one of them out"
            )
        if self.capture != "none" and self.model.image_tower:
            raise ConfigError(f"capture: wanted none with an image_tower, got {self.capture}; leave --capture out")
        for part, names in STARTS.items():
            if getattr(self, f"train_{part}") == "lora" and self.starts_random(part):
                raise ConfigError(
                    f"train_{part}: wanted weights to start from with lora, got none; give {' or '.join(names)}"
                )
            if self.capture == "compile" and getattr(self, f"train_{part}") != "full":  # torch 2.13 cannot trace it
                raise ConfigError(f"train_{part}: wanted full with --capture compile; leave one of them out")
        own = [name for name in ("lr_image", "lr_text") if getattr(self, name) is not None]
        if own and self.optimizer == "muon" and not self.lr_cross:
            raise ConfigError(f"{own[0]}: wanted lr_cross above 0 with Muon, whose rate it scales, got 0; raise it")
        weights = self.objective_weights
        if not any(weights.values()) or (self.itm_weight and not self.itc_weight):
            raise ConfigError(
                f"weights: wanted at least one objective, and ITC with ITM, got {', '.join(weights)} = "
                f"{tuple(weights.values())}"
            )
        if self.batch_size == 1 and self.comparing_weights:
            raise ConfigError(
                f"batch_size: wanted at least 2, to compare the pairs of a batch, got 1; raise it, or set "
                f"{' and '.join(self.comparing_weights)} to 0"
            )
        if self.capture != "none" and (self.text_tower or self.model.text_tower):
            raise ConfigError(f"capture: wanted none with a text_tower, got {self.capture}; leave it out")
        own = [name for name in ("text_weights", "tokenizer") if getattr(self, name) is not None]
        if self.text_tower is not None and own:
            raise ConfigError(
                f"text_tower: wanted no {' and no '.join(own)} with it, as its folder has both; leave one of them out"
            )
        names = ("image_weights", "text_weights", "text_tower", "tokenizer")
        if self.keep_start and (self.initial_model is None or not self.itc_weight):
            raise ConfigError("keep_start: wanted an initial_model, and ITC, whose embeddings it keeps; give both")
        if self.keep_start and self.capture != "none":
            raise ConfigError(f"keep_start: wanted --capture none, got {self.capture}; leave one of them out")
        own = [name for name in ("own_loss", "own_masks") if getattr(self, name) is not None]
        if own and self.capture != "none":  # masks may change their number, and torch may not trace a loss
            raise ConfigError(f"{own[0]}: wanted --capture none, got {self.capture}; leave one of them out")
        others = [name for name in names if getattr(self, name) is not None]
        if self.initial_model is not None and others:
            raise ConfigError(
                f"initial_model: wanted no further weights and no tokenizer, got {', '.join(others)}; "
                f"the model has its own encoders and tokenizer"
            )

    @cached_property
    def parsed_stages(self) -> tuple[Stage, ...]:
        """Stages of the run; one of the model's own side without `stages`."""
        return parse_stages(self.stages, self.model, self.max_steps)

    def model_at(self, step: int) -> MaskVLMConfig:
        return next(stage.model for stage in reversed(self.parsed_stages) if stage.start <= step)

    def starts_random(self, part: str) -> bool:
        """True if a part of the model, one of `STARTS`, starts from random weights."""
        return all(getattr(self, name) is None for name in STARTS[part])

    @classmethod
    def preset(cls, name: str, *, data: Path, out: Path, **changes: Any) -> "PretrainConfig":
        """The recipe of a preset, one of `RECIPES`, with changed settings.

        ConfigError for an unknown preset, or a setting that is not allowed.
        """
        recipe = recipe_of(name)
        values = {"model": MaskVLMConfig.preset(recipe.model), **recipe.settings}
        return cls(**{"data": data, "out": out, **values, **changes})

    @property
    def fixed_shapes(self) -> bool:
        """True if steps need few different shapes, and the step's number as a tensor: `capture` is not none."""
        return self.capture != "none"
