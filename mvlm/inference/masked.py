"""Masked tokens and patches, predicted from the rest of an image and its caption.

Shape legend: B batch, S image side, T packed tokens, L tokens of a caption, M masked tokens, K masked patches, P patch
side.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError, shown
from mvlm.inference.encode import eval_loader, packed_tokens
from mvlm.inference.images import hide_patches
from mvlm.inference.texts import MAX_CHARACTERS, check_unicode
from mvlm.model.encoders import masked_patches, patchify, unpatchify
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import mask_tokens
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.captions import clean_line

STRIP_IMAGES = 8


class Guess(NamedTuple):
    """A token in the place of a [MASK]."""

    token: str
    probability: float


class FilledText(NamedTuple):
    """A text whose [MASK]s are filled in."""

    text: str
    """The text with the likeliest token in each place."""
    guesses: list[list[Guess]]
    """For each [MASK], the likeliest tokens, best first."""


class Reconstruction(NamedTuple):
    """Reconstruction of an image from its visible patches. Pixels are uint8 (S, S, 3), for `PIL.Image.fromarray`."""

    image: NDArray[np.uint8]
    """The image as the model takes it."""
    masked: NDArray[np.uint8]
    """The image with its hidden patches grey."""
    rebuilt: NDArray[np.uint8]
    """The image with its hidden patches as the model predicts them."""
    hidden: NDArray[np.bool_]
    """Grid of patches (rows, columns), True = hidden."""


def tokens_with_masks(caption: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Tokens int64 (L,) of a caption in which every "[MASK]" is one token to guess; L is at most `length`.

    The other tokens are those that the caption has with a word in the place of [MASK].

    Raises:
        ConfigError: the caption is no text, has no [MASK], or is too long.
    """
    if not isinstance(caption, str):
        raise ConfigError(f"caption: wanted one text, a str, got {shown(caption)}")
    check_unicode(caption, "caption")
    if len(caption) > MAX_CHARACTERS:
        raise ConfigError(f"caption: wanted at most {MAX_CHARACTERS} characters, found {len(caption)}; shorten it")
    between = clean_line(caption).split("[MASK]")
    if len(between) == 1:
        raise ConfigError(f'caption: wanted at least one [MASK], got {caption!r}; write it as in "flag of [MASK]"')
    # Parts are tokenized one by one, so their number is looked at before.
    inner = tokenizer.encode_masked(between) if len(between) <= length else []
    found = 2 + max(len(inner), len(between) - 1)
    if found > length:
        raise ConfigError(
            f"caption: wanted at most {length} tokens, [CLS] and [SEP] included, found {found}; shorten the caption"
        )
    return torch.tensor([tokenizer.cls_id, *inner, tokenizer.sep_id])


@torch.no_grad()
def fill_mask(
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

    Args:
        images: uint8 (B, 3, S, S).
        tokens: Packed captions, int64 (T,).
        lengths: Tokens of each caption.
        token_ids: Positions in `tokens` to mask, int64 (M,).
        top: Guesses for each masked token.

    Returns:
        The `top` likeliest token ids of the tokenizer, int64 (M, top), and their probabilities (M, top), on the CPU.
    """
    device = next(model.parameters()).device
    starts = torch.tensor([0, *np.cumsum(lengths)], device=device)
    hidden = mask_tokens(tokens.to(device), token_ids.to(device), model.config.mask_token_id)
    with autocast(device, precision):
        v = model.encode_image(images.to(device))
        wm, key_mask = model.encode_text(hidden, starts, max(lengths))
        logits = model.fill_mask(v, wm, key_mask, starts, token_ids.to(device)).float()
    logits = logits[:, : tokenizer.vocab_size]  # the LM head may be larger than the tokenizer's vocabulary
    found = logits.softmax(-1).topk(top, dim=-1)
    return found.indices.cpu(), found.values.cpu()


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
        steps: Steps in which the patches are rebuilt, an equal number in each, rounded up. Later ones see the earlier
            ones. A predicted pixel has no probability, so those come first that continue the patches beside them best
            (`border_errors`).

    Returns:
        uint8 (B, 3, S, S) on the CPU: given pixels in visible patches, the model's pixels in masked ones.
    """
    config, device = model.config, next(model.parameters()).device
    images, patch_ids = images.to(device), patch_ids.to(device)
    mean, std = (
        torch.tensor(values, device=device).repeat_interleave(config.patch_size**2)
        for values in (config.image_mean, config.image_std)
    )
    tokens, starts = packed_tokens(captions, tokenizer, config.text_length)
    with autocast(device, precision):
        w, key_mask = model.encode_text(tokens.to(device), starts.to(device), config.text_length)
    patches, steps = patchify(images, config.patch_size), min(steps, patch_ids.shape[1])
    for step in range(steps):
        hidden = masked_patches(patch_ids, config.num_patches)
        with autocast(device, precision):
            shown = unpatchify(patches, config.patch_size)
            vm = model.encode_masked_image(shown, patch_ids)
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
