"""Every setting of a model and of a run, the recipes, and their JSON files."""

from mvlm.config.model import PRESETS, MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.recipes import pretrain_defaults

__all__ = ["PRESETS", "MaskVLMConfig", "PretrainConfig", "pretrain_defaults"]
