"""Configuration of a pretraining run: the groups of settings together, and the model's."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mvlm.config.groups import (
    CheckpointSettings,
    ComputeSettings,
    DataSettings,
    LoggingSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    SafetySettings,
    ScheduleSettings,
    WeightSettings,
)
from mvlm.config.model import MaskVLMConfig
from mvlm.config.ranges import check_values
from mvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(  # a dataclass takes fields from its bases from last to first
    SafetySettings,
    CheckpointSettings,
    LoggingSettings,
    ParallelSettings,
    ComputeSettings,
    WeightSettings,
    OptimizerSettings,
    ScheduleSettings,
    ObjectiveSettings,
    DataSettings,
    RunSettings,
):
    """Configuration of a pretraining run: the settings of all groups, and the model's. ConfigError for invalid ones."""

    model: MaskVLMConfig = field(default_factory=MaskVLMConfig)
    """Configuration of the model; the tokenizer decides `mask_token_id`."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.compile and (self.accumulate > 1 or self.plan != "fast" or self.checkpoint_activations):
            raise ConfigError(
                f"compile: wanted --plan fast, --accumulate 1 and no --checkpoint-activations, got --plan {self.plan}, "
                f"--accumulate {self.accumulate}{', --checkpoint-activations' * self.checkpoint_activations}; change "
                f"them or leave --compile out"
            )
        if self.cuda_graphs and (self.accumulate > 1 or self.plan != "fast" or self.compile):
            raise ConfigError(
                f"cuda_graphs: wanted --plan fast, --accumulate 1 and no --compile, got --plan {self.plan}, "
                f"--accumulate {self.accumulate}{', --compile' * self.compile}; change them or leave --cuda-graphs out"
            )
        weights = (self.mlm_weight, self.mim_weight, self.itc_weight, self.itm_weight)
        if not any(weights) or (self.itm_weight and not self.itc_weight):
            raise ConfigError(
                f"weights: wanted at least one objective, and ITC with ITM, got mlm, mim, itc, itm = {weights}"
            )
        if self.batch_size == 1 and (self.itc_weight or self.itm_weight):
            raise ConfigError(
                "batch_size: wanted at least 2, as ITC and ITM compare the pairs of a batch, got 1; raise it, or set "
                "itc_weight and itm_weight to 0"
            )
        others = [name for name in ("image_weights", "text_weights", "tokenizer") if getattr(self, name) is not None]
        if self.initial_model is not None and others:
            raise ConfigError(
                f"initial_model: wanted no further weights and no tokenizer, got {', '.join(others)}; "
                f"the model has its own encoders and tokenizer"
            )
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise ConfigError(f"seed must be in [-2^63, 2^64), got {self.seed}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}


GROUPS: tuple[type, ...] = PretrainConfig.__bases__[::-1]
"""Groups of settings, in the order of --help and config.json."""


def resume_may_change(name: str) -> bool:
    """True if a resumed run may change this setting. Model settings may never change."""
    return any(name in {f.name for f in fields(group)} for group in GROUPS if group.resume_may_change)
