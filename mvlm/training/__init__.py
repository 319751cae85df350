"""The training loop, its guards, and `pretrain`, which runs it from a configuration."""

from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer

__all__ = ["Trainer", "pretrain"]
