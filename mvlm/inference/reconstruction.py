"""Masked images, rebuilt from their visible patches and captions.

Shape legend: B batch, S image side, K masked patches, P patch side.
"""

import numpy as np
import torch
from torch import Tensor

from mvlm.device import autocast
from mvlm.inference.encode import encode_captions, eval_loader
from mvlm.inference.images import hide_patches
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.patches import masked_patches, patchify, unpatchify
from mvlm_dataloading import Dataset, Tokenizer

STRIP_IMAGES = 8


@torch.no_grad()
def reconstruct(
    model: MaskVLM,
    tokenizer: Tokenizer,
    images: Tensor,
    captions: list[str],
    patch_ids: Tensor,
    precision: str = "auto",
) -> Tensor:
    """Rebuild the masked patches of images from their visible patches and captions.

    Args:
        images: uint8 (B, 3, S, S).
        captions: One for each image.
        patch_ids: Masked patches, int64 (B, K).
        precision: auto, bf16 or fp32.

    Returns:
        uint8 (B, 3, S, S) on the CPU: given pixels in visible patches, the model's pixels in masked ones.
    """
    config, device = model.config, next(model.parameters()).device
    images, patch_ids = images.to(device), patch_ids.to(device)
    with autocast(device, precision):
        w, key_mask = encode_captions(model, captions, tokenizer)
        vm = model.encode_image(images, masked_patches(patch_ids, config.num_patches))
        predicted = model.reconstruct(vm, w, key_mask, patch_ids).float()  # (B, K, 3*P*P), normalised
    mean, std = (
        torch.tensor(values, device=device).repeat_interleave(config.patch_size**2)
        for values in (config.image_mean, config.image_std)
    )
    pixels = ((predicted * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    patches = patchify(images, config.patch_size)
    filled = patches.scatter(1, patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), pixels)
    return unpatchify(filled, config.patch_size).cpu()


def reconstruction_strip(model: MaskVLM, split: Dataset, tokenizer: Tokenizer, precision: str = "auto") -> np.ndarray:
    """The first eight images of a split in columns: original, masked, rebuilt with its caption. uint8 (3S, 8S, 3)."""
    batch, masks = next(iter(eval_loader(split, model, tokenizer)))
    images, patch_ids = batch.images[:STRIP_IMAGES], masks.patch_ids[:STRIP_IMAGES].to(batch.images.device)
    captions = [split.captions(i)[0] for i in batch.sample_id[:STRIP_IMAGES].tolist()]
    masked = hide_patches(images, patch_ids, model.config.patch_size)
    rebuilt = reconstruct(model, tokenizer, images, captions, patch_ids, precision)
    rows = [torch.cat(list(row.cpu()), dim=2) for row in (images, masked, rebuilt)]  # (3, S, 8S) each
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
