"""Masked images, rebuilt from their visible patches and captions.

Shape legend: B batch, S image side, K masked patches, P patch side.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError
from mvlm.inference.encode import encode_captions, eval_loader
from mvlm.inference.images import hide_patches
from mvlm.inference.results import Reconstruction
from mvlm.inference.texts import check_texts
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.patches import masked_patches, patchify, unpatchify
from mvlm_dataloading import Dataset, Tokenizer, draw_patch_masks

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


def reconstruct_image(
    model: MaskVLM,
    tokenizer: Tokenizer,
    image: Tensor,
    text: str,
    hide: NDArray[Any] | Tensor | None = None,
    seed: int = 0,
    precision: str = "auto",
) -> Reconstruction:
    """Rebuild hidden patches of one image uint8 (3, S, S) from its visible patches and a text.

    Args:
        hide: bool (h, w) over the whole image, True = hidden: every patch that it touches. None: a mask as in training,
            drawn from `seed`.

    Raises:
        ConfigError: nothing is hidden, `hide` is not bool (h, w), or the text cannot be used.
    """
    config = model.config
    check_texts([text], tokenizer, config.text_length)
    ids = _drawn_patches(model, seed) if hide is None else hidden_patches(hide, config.image_size // config.patch_size)
    masked = hide_patches(image[None], ids, config.patch_size)[0]
    rebuilt = reconstruct(model, tokenizer, image[None], [text], ids, precision)[0]
    side = config.image_size // config.patch_size
    hidden = masked_patches(ids, config.num_patches).unflatten(1, (side, side))[0].numpy()
    image, masked, rebuilt = (pixels.permute(1, 2, 0) for pixels in (image, masked, rebuilt))
    return Reconstruction(image.numpy(), masked.numpy(), rebuilt.numpy(), hidden)


def _drawn_patches(model: MaskVLM, seed: int) -> Tensor:
    """Masked patches int64 (1, K) of one image, as in training."""
    config = model.config
    ids = draw_patch_masks(
        seed, 0, [0], image_size=config.image_size, patch_size=config.patch_size, mask_block=config.mask_block,
        ratio=config.image_mask_ratio,
    )  # fmt: skip
    return torch.from_numpy(ids)


def hidden_patches(hide: NDArray[Any] | Tensor, side: int) -> Tensor:
    """Patches int64 (1, K), in row-major order, of a grid of side x side that a mask bool (h, w) touches anywhere.

    Pixel (y, x) of the mask covers y/h to (y+1)/h and x/w to (x+1)/w of the image.
    """
    mask = np.asarray(hide)
    if mask.ndim != 2 or mask.dtype != np.bool_ or not mask.any():
        raise ConfigError(
            f"hide: wanted bool (h, w) with a hidden pixel, got {mask.dtype} {mask.shape}"
            f"{'' if mask.size == 0 or mask.any() else ' with none'}; hide something"
        )
    bounds = [
        [(k * length // side, -(-(k + 1) * length // side)) for k in range(side)] for length in mask.shape
    ]  # first and last pixel of each row and column of patches
    touched = [[mask[top:bottom, left:right].any() for left, right in bounds[1]] for top, bottom in bounds[0]]
    return torch.tensor(touched).flatten().nonzero().T


def reconstruction_strip(model: MaskVLM, split: Dataset, tokenizer: Tokenizer, precision: str = "auto") -> np.ndarray:
    """The first eight images of a split in columns: original, masked, rebuilt with its caption. uint8 (3S, 8S, 3)."""
    batch, masks = next(iter(eval_loader(split, model, tokenizer)))
    images, patch_ids = batch.images[:STRIP_IMAGES], masks.patch_ids[:STRIP_IMAGES].to(batch.images.device)
    captions = [split.captions(i)[0] for i in batch.sample_id[:STRIP_IMAGES].tolist()]
    masked = hide_patches(images, patch_ids, model.config.patch_size)
    rebuilt = reconstruct(model, tokenizer, images, captions, patch_ids, precision)
    rows = [torch.cat(list(row.cpu()), dim=2) for row in (images, masked, rebuilt)]  # (3, S, 8S) each
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
