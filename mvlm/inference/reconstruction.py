"""One picture and one caption through a trained model: rebuild pixels, fill in words.

Shape legend: B batch, S image side, K masked patches, N patches, P patch side, M masked tokens.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError, RunError
from mvlm.inference.encode import encode_captions
from mvlm.model.encoders import patchify, unpatchify
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.patches import mask_tokens, masked_patches
from mvlm_dataloading import Tokenizer

GREY = 190  # masked patches are shown in this grey


def load_picture(path: Path, side: int) -> Tensor:
    """A picture file as uint8 (3, S, S), squeezed to a square, transparency on white; RunError if it does not open."""
    try:
        with Image.open(path) as file:
            rgba = file.convert("RGBA")
    except FileNotFoundError:
        raise RunError(f"{path}: wanted a picture, found no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RunError(f"{path}: wanted a picture, could not read it: {error}") from None
    white = Image.new("RGBA", rgba.size, "white")
    picture = Image.alpha_composite(white, rgba).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def tokens_with_gaps(caption: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """int64 (L,) tokens of a caption in which every "[MASK]" stands for one token to guess; at most `length`.

    The tokenizer itself never makes a special token of a caption's text, so the pieces between are encoded alone.

    Raises:
        ConfigError: a gap lies beyond `length`.
    """
    inner: list[int] = []
    for number, piece in enumerate(caption.split("[MASK]")):
        inner += [tokenizer.mask_id] if number else []
        if piece.strip():
            inner += tokenizer.encode([piece.strip()], length)[0][1:-1].tolist()
    if tokenizer.mask_id in inner[length - 2 :]:
        raise ConfigError(f"caption: wanted every [MASK] among the first {length - 2} tokens, got one at or after them")
    return torch.tensor([tokenizer.cls_id, *inner[: length - 2], tokenizer.sep_id])


def hide_patches(images: Tensor, patch_ids: Tensor, patch_size: int) -> Tensor:
    """uint8 images (B, 3, S, S) with the patches int64 (B, K) painted grey."""
    patches = patchify(images, patch_size)
    return unpatchify(patches.scatter(1, patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), GREY), patch_size)


@torch.no_grad()
def reconstruct(
    model: MaskVLM,
    tokenizer: Tokenizer,
    images: Tensor,
    captions: list[str],
    patch_ids: Tensor,
    precision: str = "auto",
) -> Tensor:
    """Rebuild the masked patches of images from what is left and from captions.

    images uint8 (B, 3, S, S), patch_ids int64 (B, K). Returns uint8 (B, 3, S, S) on the CPU: the given pixels where
    nothing was masked, the model's elsewhere.
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


@torch.no_grad()
def fill(
    model: MaskVLM,
    tokenizer: Tokenizer,
    images: Tensor,
    tokens: Tensor,
    lengths: list[int],
    token_ids: Tensor,
    top: int = 1,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Guess masked tokens from the rest of each caption and from its image.

    images uint8 (B, 3, S, S); tokens packed int64 (T,) with `lengths`; token_ids int64 (M,), positions to hide.
    Returns the `top` likeliest token ids int64 (M, top), of those that the tokenizer has, and their probabilities
    (M, top), on the CPU.
    """
    device = next(model.parameters()).device
    starts = torch.tensor([0, *np.cumsum(lengths)], device=device)
    hidden = mask_tokens(tokens.to(device), token_ids.to(device), model.config.mask_token_id)
    with autocast(device, precision):
        v = model.encode_image(images.to(device))
        wm, key_mask = model.encode_text(hidden, starts, max(lengths))
        logits = model.fill_mask(v, wm, key_mask, starts, token_ids.to(device)).float()
    logits = logits[:, : tokenizer.vocab_size]  # the model may have rows for tokens that there are not
    found = logits.softmax(-1).topk(top, dim=-1)
    return found.indices.cpu(), found.values.cpu()
