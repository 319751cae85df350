"""A schedule of the masking ratio: it rises linearly from 0.3 to 0.6 over the first 1,000 updates.

    mvlm pretrain tiny --data data/emoji --out runs/schedule --own-masks examples/masking_schedule.py:rising

`draw.step` counts updates, whatever the microbatches, and goes on in a resumed run.
"""

from mvlm.training.own_masks import MaskDraw
from mvlm_dataloading import Masks

FIRST, LAST, STEPS = 0.3, 0.6, 1000


def rising(draw: MaskDraw) -> Masks:
    """Random masks with the ratio of this update, for image and caption."""
    ratio = FIRST + (LAST - FIRST) * min(1.0, draw.step / STEPS)
    # Blocks of one patch: 96 px are only 9 blocks of 32 px, which would round the ratio to ninths.
    return draw.random(image_mask_ratio=ratio, text_mask_ratio=ratio, mask_block=draw.masking.patch_size)
