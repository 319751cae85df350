"""Settings of models and of runs, their ranges, recipes and JSON files."""

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.recipes import pretrain_defaults

__all__ = ["PRESETS", "MaskVLMConfig", "PretrainConfig", "pretrain_defaults"]
