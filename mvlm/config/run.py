"""Configuration that every run has, of pretraining or of fine-tuning."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mvlm.config.groups import (
    CheckpointSettings,
    ComputeSettings,
    DataSettings,
    LoggingSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    SafetySettings,
    ScheduleSettings,
)
from mvlm.config.model import MaskVLMConfig
from mvlm.config.ranges import check_values
from mvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(  # a dataclass takes fields from its bases from last to first
    SafetySettings,
    CheckpointSettings,
    LoggingSettings,
    ParallelSettings,
    ComputeSettings,
    OptimizerSettings,
    ScheduleSettings,
    DataSettings,
    RunSettings,
):
    """Settings of every run, and the model's. ConfigError for invalid ones."""

    model: MaskVLMConfig = field(default_factory=MaskVLMConfig)
    """Configuration of the model. Pretraining takes `mask_token_id` from the tokenizer, fine-tuning all of it from the
    checkpoint."""

    def __post_init__(self) -> None:
        check_values(self)
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise ConfigError(f"seed must be in [-2^63, 2^64), got {self.seed}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")

    @property
    def fixed_shapes(self) -> bool:
        """True if a step sees few shapes, and its number as a tensor."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}
