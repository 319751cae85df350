"""Features of images and captions, of a batch or of all of a split.

Shape legend: B batch, I images, T captions, N patches, L tokens (the model's text length), C width,
E contrastive width, S image side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvlm.device import autocast
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Dataset, Loader, Tokenizer

BATCH = 64


@dataclass(frozen=True)
class EncodedSplit:
    """Features of one split, on the CPU, so that the device holds one batch at a time."""

    v: Tensor
    """(I, 1+N, C), unmasked images."""
    w: Tensor
    """(T, L, C), unmasked captions, padded."""
    key_mask: Tensor
    """bool (T, L), True = a token."""
    image_embedding: Tensor
    """(I, E), unit length."""
    text_embedding: Tensor
    """(T, E), unit length."""
    owner: Tensor
    """int64 (T,), image of each caption."""
    first: Tensor
    """int64 (I,), row of each image's first caption."""
    captions: list[str]
    """Texts of the T captions."""


def eval_loader(
    dataset: Dataset, model: MaskVLM, tokenizer: Tokenizer, seed: int = 0, batch_size: int | None = None
) -> Loader:
    """A loader for one pass in order over uncropped images and first captions, with masks drawn from `seed`."""
    config = model.config
    device = next(model.parameters()).device
    return Loader(
        dataset,
        tokenizer,
        batch_size=batch_size or BATCH,
        image_size=config.image_size,
        text_length=config.text_length,
        seed=seed,
        device=None if device.type == "cpu" else str(device),
        patch_size=config.patch_size,
        mask_block=config.mask_block,
        image_mask_ratio=config.image_mask_ratio,
        text_mask_ratio=config.text_mask_ratio,
        train=False,
    )


def encode_captions(model: MaskVLM, captions: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Features (T, L, C) of T captions and their key mask bool (T, L), True = a token; L is the model's text length."""
    device, length = next(model.parameters()).device, model.config.text_length
    tokens, lengths = tokenizer.encode(captions, length)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    return model.encode_text(torch.from_numpy(tokens).to(device), starts.to(device), length)


class ImageFeatures(NamedTuple):
    """Features of a batch of images, on the device."""

    v: Tensor
    """(B, 1+N, C)."""
    embedding: Tensor
    """(B, E), unit length."""


class TextFeatures(NamedTuple):
    """Features of a batch of captions, on the device."""

    w: Tensor
    """(B, L, C), padded."""
    key_mask: Tensor
    """bool (B, L), True = a token."""
    embedding: Tensor
    """(B, E), unit length."""


@torch.no_grad()
def image_features(model: MaskVLM, images: Tensor, precision: str = "auto") -> ImageFeatures:
    """Encode a batch of images uint8 (B, 3, S, S). `precision` is auto, bf16 or fp32."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        v = model.encode_image(images.to(device))
        return ImageFeatures(v, model.embed_image(v))


@torch.no_grad()
def text_features(model: MaskVLM, captions: list[str], tokenizer: Tokenizer, precision: str = "auto") -> TextFeatures:
    """Encode a batch of captions. Longer ones are truncated. `precision` is auto, bf16 or fp32."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        w, key_mask = encode_captions(model, captions, tokenizer)
        return TextFeatures(w, key_mask, model.embed_text(w))


@torch.no_grad()
def match_log_odds(model: MaskVLM, v: Tensor, w: Tensor, key_mask: Tensor, precision: str = "auto") -> Tensor:
    """ITM's log-odds of a match for B pairs of features, float32 (B,) on the CPU.

    v (B, 1+N, C), w (B, L, C), key_mask bool (B, L), True = a token.
    """
    device = next(model.parameters()).device
    length = int(key_mask.sum(1).max())  # of the longest caption; columns after it are padding
    with autocast(device, precision):
        logits = model.match(v.to(device), w[:, :length].to(device), key_mask[:, :length].to(device)).float()
    return (logits[:, 1] - logits[:, 0]).cpu()


def encode_split(model: MaskVLM, dataset: Dataset, tokenizer: Tokenizer, precision: str = "auto") -> EncodedSplit:
    """Encode all images and captions of `dataset`. `precision` is auto, bf16 or fp32."""
    images, image_embeddings = [], []
    for batch, _ in eval_loader(dataset, model, tokenizer):
        found = image_features(model, batch.images, precision)
        images.append(found.v.cpu())
        image_embeddings.append(found.embedding.cpu())
    captions, owner, first = [], [], []
    for i in range(len(dataset)):
        first.append(len(captions))
        captions += dataset.captions(i)
        owner += [i] * (len(captions) - first[-1])
    texts, key_masks, text_embeddings = [], [], []
    for start in range(0, len(captions), BATCH):
        found = text_features(model, captions[start : start + BATCH], tokenizer, precision)
        texts.append(found.w.cpu())
        key_masks.append(found.key_mask.cpu())
        text_embeddings.append(found.embedding.cpu())
    return EncodedSplit(
        torch.cat(images),
        torch.cat(texts),
        torch.cat(key_masks),
        torch.cat(image_embeddings),
        torch.cat(text_embeddings),
        torch.tensor(owner),
        torch.tensor(first),
        captions,
    )
