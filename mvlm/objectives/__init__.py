"""The four objectives (MLM, MIM, ITC, ITM) as functions of tensors, which any model can call.

Features and logits may have any floating dtype, also under autocast. Losses are scalars, in float32, or in float64 of
float64.

`examples/losses_in_transformers.py` calls them for a ViT and a BERT.
"""

from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm.objectives.losses import (
    contrastive_logits,
    contrastive_loss,
    masked_image_loss,
    masked_language_loss,
    matching_loss,
)
from mvlm.objectives.negatives import NegativeSampling, matching_pairs

__all__ = [
    "NegativeSampling",
    "contrastive_logits",
    "contrastive_loss",
    "linear_cross_entropy",
    "masked_image_loss",
    "masked_language_loss",
    "matching_loss",
    "matching_pairs",
]
