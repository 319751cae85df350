"""Masked images, rebuilt from their visible patches and captions.

Shape legend: B batch, S image side, K masked patches, P patch side.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError
from mvlm.inference.arguments import whole_number
from mvlm.inference.encode import encode_captions, eval_loader
from mvlm.inference.images import hide_patches
from mvlm.inference.texts import checked_texts
from mvlm.model.encoders import masked_patches, patchify, unpatchify, visible_patches
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.loader.masking import draw_patch_masks

STRIP_IMAGES = 8


class Reconstruction(NamedTuple):
    """An image, the same with hidden patches, and rebuilt. Pixels are uint8 (S, S, 3), for `PIL.Image.fromarray`."""

    image: NDArray[np.uint8]
    """The image as the model takes it."""
    masked: NDArray[np.uint8]
    """Hidden patches are grey."""
    rebuilt: NDArray[np.uint8]
    """Visible patches as they are, hidden ones as the model draws them."""
    hidden: NDArray[np.bool_]
    """(rows, columns) of patches, True = hidden."""


@torch.no_grad()
def reconstruct(
    model: MaskVLM,
    tokenizer: Tokenizer,
    images: Tensor,
    captions: list[str],
    patch_ids: Tensor,
    precision: str = "auto",
    steps: int = 1,
) -> Tensor:
    """Rebuild the masked patches of images from their visible patches and captions.

    Args:
        images: uint8 (B, 3, S, S).
        captions: One for each image.
        patch_ids: Masked patches, int64 (B, K).
        precision: auto, bf16 or fp32.
        steps: Steps in which the patches are rebuilt, an equal number in each, rounded up. Later ones see the earlier
            ones. A predicted pixel has no probability, so those come first that continue the patches beside them best
            (`border_errors`).

    Returns:
        uint8 (B, 3, S, S) on the CPU: given pixels in visible patches, the model's pixels in masked ones.
    """
    config, device = model.config, next(model.parameters()).device
    images, patch_ids = images.to(device), patch_ids.to(device)
    if steps < 1:
        raise ConfigError(f"steps: wanted at least 1, got {steps}")
    mean, std = (
        torch.tensor(values, device=device).repeat_interleave(config.patch_size**2)
        for values in (config.image_mean, config.image_std)
    )
    with autocast(device, precision):
        w, key_mask = encode_captions(model, captions, tokenizer)
    patches, steps = patchify(images, config.patch_size), min(steps, patch_ids.shape[1])
    for step in range(steps):
        hidden = masked_patches(patch_ids, config.num_patches)
        with autocast(device, precision):
            shown = unpatchify(patches, config.patch_size)
            if config.drop_masked:  # as in training
                vm = model.image_encoder.forward_visible(shown, visible_patches(patch_ids, config.num_patches))
            else:
                vm = model.encode_image(shown, hidden)
            predicted = model.reconstruct(vm, w, key_mask, patch_ids).float()  # (B, K, 3*P*P), normalised
        pixels = ((predicted * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        order = border_errors(patches, ~hidden, pixels, patch_ids).sort(stable=True).indices
        number = -(-patch_ids.shape[1] // (steps - step))
        surest, rest = order[:, :number], order[:, number:].sort().values
        chosen = pixels.gather(1, surest.unsqueeze(-1).expand(-1, -1, pixels.shape[-1]))
        places = patch_ids.gather(1, surest).unsqueeze(-1).expand_as(chosen)
        patches = patches.scatter(1, places, chosen)
        patch_ids = patch_ids.gather(1, rest)
    return unpatchify(patches, config.patch_size).cpu()


def border_errors(patches: Tensor, known: Tensor, pixels: Tensor, patch_ids: Tensor) -> Tensor:
    """Jump from predicted patches to the known patches beside them: float (B, K), infinite without a known neighbour.

    It is the mean absolute difference of pixels on both sides of a border, over the borders of a patch with a known
    one.

    Args:
        patches: values of all patches (B, N, 3*P*P).
        known: bool (B, N), True = values may be used.
        pixels: predicted values (B, K, 3*P*P) of the patches patch_ids int64 (B, K).
    """
    side, patch = round(patches.shape[1] ** 0.5), round((patches.shape[2] / 3) ** 0.5)
    given, own = (x.float().unflatten(-1, (3, patch, patch)) for x in (patches, pixels))  # (B, N or K, 3, P, P)
    y, x = patch_ids // side, patch_ids % side
    total = count = torch.zeros(patch_ids.shape, device=patches.device)
    for dy, dx, edge, theirs in (
        (-1, 0, own[..., 0, :], given[..., -1, :]),
        (1, 0, own[..., -1, :], given[..., 0, :]),
        (0, -1, own[..., 0], given[..., -1]),
        (0, 1, own[..., -1], given[..., 0]),
    ):
        inside = (y + dy >= 0) & (y + dy < side) & (x + dx >= 0) & (x + dx < side)
        beside = torch.where(inside, patch_ids + dy * side + dx, patch_ids)
        seen = inside & known.gather(1, beside)
        across = theirs.gather(1, beside[..., None, None].expand(-1, -1, 3, patch))  # (B, K, 3, P)
        total = total + (edge - across).abs().mean((-1, -2)) * seen
        count = count + seen
    return torch.where(count > 0, total / count.clamp(min=1), float("inf"))


def reconstruct_image(
    model: MaskVLM,
    tokenizer: Tokenizer,
    image: Tensor,
    text: str,
    hide: NDArray[Any] | Tensor | None = None,
    seed: int = 0,
    precision: str = "auto",
    steps: int = 1,
) -> Reconstruction:
    """Rebuild hidden patches of one image uint8 (3, S, S) from its visible patches and a text.

    Args:
        hide: bool (h, w) over the whole image, True = hidden: every patch that it touches. None: a mask as in training,
            drawn from `seed`.
        steps: steps in which the patches are rebuilt (`reconstruct`).

    Raises:
        ConfigError: nothing is hidden, `hide` is not bool (h, w), or the text cannot be used.
    """
    config = model.config
    seed, steps = whole_number("seed", seed, None), whole_number("steps", steps)
    (text,) = checked_texts([text], tokenizer, config.text_length)
    ids = _drawn_patches(model, seed) if hide is None else hidden_patches(hide, config.image_size // config.patch_size)
    masked = hide_patches(image[None], ids, config.patch_size)[0]
    rebuilt = reconstruct(model, tokenizer, image[None], [text], ids, precision, steps)[0]
    side = config.image_size // config.patch_size
    hidden = masked_patches(ids, config.num_patches).unflatten(1, (side, side))[0].numpy()
    image, masked, rebuilt = (pixels.permute(1, 2, 0) for pixels in (image, masked, rebuilt))
    return Reconstruction(image.numpy(), masked.numpy(), rebuilt.numpy(), hidden)


def _drawn_patches(model: MaskVLM, seed: int) -> Tensor:
    """Masked patches int64 (1, K) of one image, as in training."""
    config = model.config
    return torch.from_numpy(draw_patch_masks(seed, 0, [0], image_size=config.image_size, masking=config))


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
