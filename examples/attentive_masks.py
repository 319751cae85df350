"""Attentive masking: the patches that a caption attends to most are masked.

mvlm pretrain tiny --data data/emoji --out runs/attentive --own-masks examples/attentive_masks.py:attended
"""

from dataclasses import replace

from mvlm.training.own_masks import MaskDraw
from mvlm_dataloading import Masks


def attended(draw: MaskDraw) -> Masks:
    """Mask the patches with most attention, as many as the loader masked; captions keep the loader's masks."""
    number = draw.masks.patch_ids.shape[1]
    patches = draw.attention().topk(number, dim=1).indices  # (B, K)
    return replace(draw.masks, patch_ids=patches.sort(dim=1).values)
