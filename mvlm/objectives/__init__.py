"""The four objectives, functions of tensors."""

from mvlm.objectives.losses import Losses

__all__ = ["Losses"]
