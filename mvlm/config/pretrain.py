"""Configuration of a pretraining run: the settings of every run, and those of pretraining alone."""

from dataclasses import dataclass

from mvlm.config.groups import CaptureSettings, MuonSettings, ObjectiveSettings, WeightSettings
from mvlm.config.run import RunConfig
from mvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(CaptureSettings, WeightSettings, MuonSettings, ObjectiveSettings, RunConfig):
    """Configuration of a pretraining run. ConfigError for invalid settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capture != "none" and (self.accumulate > 1 or self.plan != "fast"):
            raise ConfigError(
                f"capture: wanted --plan fast and --accumulate 1 with {self.capture}, got --plan {self.plan}, "
                f"--accumulate {self.accumulate}; change them or leave --capture out"
            )
        if self.capture == "compile" and self.checkpoint_activations:
            raise ConfigError("capture: wanted no --checkpoint-activations with compile; leave one of them out")
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

    @property
    def fixed_shapes(self) -> bool:
        """True if a step sees few shapes, and its number as a tensor: compiled, or in CUDA graphs."""
        return self.capture != "none"
