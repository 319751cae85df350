"""Settings of models and of runs, their ranges, recipes and JSON files."""

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig

__all__ = ["PRESETS", "MaskVLMConfig", "PretrainConfig"]
