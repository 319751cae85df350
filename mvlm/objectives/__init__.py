"""The four objectives (MLM, MIM, ITC, ITM) as functions of tensors."""

from mvlm.objectives.losses import Losses

__all__ = ["Losses"]
