"""A loss of your own: the masked view of an image predicts what its whole view does (KL divergence).

mvlm pretrain tiny --data data/emoji --out runs/views --own-loss examples/two_views.py:agreement
"""

import torch.nn.functional as F
from torch import Tensor

from mvlm.objectives.step import Features

TEMPERATURE, WEIGHT = 0.1, 0.5


def agreement(features: Features) -> Tensor:
    """Mean over the pairs of KL(whole || masked), of embeddings as logits. The whole view is the target."""
    whole = features.embed("image").float().detach() / TEMPERATURE  # (B, E)
    masked = features.embed("masked_image").float() / TEMPERATURE
    return WEIGHT * F.kl_div(masked.log_softmax(1), whole.softmax(1), reduction="batchmean")
