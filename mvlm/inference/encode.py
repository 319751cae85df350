"""Features of all images and captions of a split, from one pass through both encoders.

Shape legend: I images, T captions, N patches, L tokens (the model's text length), C width, E contrastive width.
"""

from dataclasses import dataclass

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


def eval_loader(dataset: Dataset, model: MaskVLM, tokenizer: Tokenizer, seed: int = 0) -> Loader:
    """A loader for one pass in order over uncropped images and first captions, with masks drawn from `seed`."""
    config = model.config
    device = next(model.parameters()).device
    return Loader(
        dataset,
        tokenizer,
        batch_size=BATCH,
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


@torch.no_grad()
def encode_split(model: MaskVLM, dataset: Dataset, tokenizer: Tokenizer, precision: str = "auto") -> EncodedSplit:
    """Encode all images and captions of `dataset`. `precision` is auto, bf16 or fp32."""
    device = next(model.parameters()).device
    images, image_embeddings = [], []
    with autocast(device, precision):
        for batch, _ in eval_loader(dataset, model, tokenizer):
            v = model.encode_image(batch.images.to(device))
            images.append(v.cpu())
            image_embeddings.append(model.embed_image(v).cpu())
    captions, owner, first = [], [], []
    for i in range(len(dataset)):
        first.append(len(captions))
        captions += dataset.captions(i)
        owner += [i] * (len(captions) - first[-1])
    texts, key_masks, text_embeddings = [], [], []
    with autocast(device, precision):
        for start in range(0, len(captions), BATCH):
            w, key_mask = encode_captions(model, captions[start : start + BATCH], tokenizer)
            texts.append(w.cpu())
            key_masks.append(key_mask.cpu())
            text_embeddings.append(model.embed_text(w).cpu())
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
