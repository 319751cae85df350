"""Microbatches of fake tensors, which have shapes and no data."""

from dataclasses import replace

import torch
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm_dataloading import Batch, Masks


def fake_microbatch(config: MaskVLMConfig, pairs: int, tokens: int, longest: int) -> tuple[Batch, Masks]:
    """Microbatch of fake tensors, with as many masked patches and tokens as the configuration says.

    Captions have `tokens` tokens each; the longest is said to have `longest`. Of masks of variable size, there are as
    many tokens as they mask on average, and as many patches as they are stored with.
    """
    side = config.image_size
    ordinary = tokens - 2
    masked = max(1, round(config.text_mask_ratio * ordinary))
    if config.text_masking == "variable":
        masked = (ordinary + 1) // 2

    def ids(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    batch = Batch(
        images=torch.empty(pairs, 3, side, side, dtype=torch.uint8),
        tokens=ids(pairs * tokens),
        cu_seqlens=torch.empty(pairs + 1, dtype=torch.int32),
        max_length=min(longest, config.text_length),
        image_id=ids(pairs),
        text_id=ids(pairs),
        sample_id=ids(pairs),
    )
    masks = Masks(patch_ids=ids(pairs, config.masked_patches), token_ids=ids(pairs * masked))
    if config.image_masking == "variable":
        everything = ids(pairs, config.num_patches)
        masks = replace(masks, patch_ids=everything, patch_weights=torch.empty(everything.shape))
    if config.text_masking == "variable":
        masks = replace(masks, token_weights=torch.empty(masks.token_ids.shape))
    return batch, masks
