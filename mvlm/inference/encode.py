"""Features of images and captions by the fast implementation, and ITM's judgement of pairs of them.

Shape legend: B batch, N patches, L tokens (the model's text length), T packed tokens, R pairs, C width,
E contrastive width, S image side.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvlm.device import autocast
from mvlm.model.fast import encode_patches, encode_tokens, fuse_pairs, project_patches
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText
from mvlm_dataloading import Augment, Dataset, Loader, Tokenizer

BATCH = 64


def eval_loader(
    dataset: Dataset,
    model: MaskVLM,
    tokenizer: Tokenizer,
    seed: int = 0,
    batch_size: int | None = None,
    **further: Any,
) -> Loader:
    """Data loader of one pass, in order, over whole images and each sample's first caption, with masks from `seed`.

    further: keyword arguments of the loader; `strip`, the number of images side by side in an image, goes to `Augment`.
    """
    strip = further.pop("strip", 1)
    device = next(model.parameters()).device
    return Loader(
        dataset,
        tokenizer,
        batch_size=batch_size or BATCH,
        seed=seed,
        device=None if device.type == "cpu" else str(device),
        train=False,
        augment=Augment(strip=strip),
        **{**model.config.loader_options(train=False), **further},
    )


def packed_tokens(captions: list[str], tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Packed tokens int64 (T,) of B captions, truncated to `length` tokens each, and their bounds int32 (B+1,)."""
    tokens, lengths = tokenizer.encode(captions, length)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(tokens), torch.from_numpy(starts)


class ImageFeatures(NamedTuple):
    """Features of a batch of images, on the device."""

    v: Tensor
    """(B, 1+N, C), features of the image, [CLS] first."""
    embedding: Tensor
    """(B, E), contrastive embeddings of the images, of unit length."""


class TextFeatures(NamedTuple):
    """Features of a batch of captions, on the device."""

    w: PackedText
    """Features (T, C) of all tokens, and the bounds of the B captions."""
    embedding: Tensor
    """(B, E), contrastive embeddings of the captions, of unit length."""


@torch.no_grad()
def image_features(model: MaskVLM, images: Tensor, precision: str = "auto") -> ImageFeatures:
    """Encode a batch of images uint8 (B, 3, S, S). `precision` is auto, bf16 or fp32."""
    device = next(model.parameters()).device
    with autocast(device, precision):
        v = encode_patches(model, project_patches(model, images.to(device)))
        return ImageFeatures(v, model.embed_image(v))


@torch.no_grad()
def text_features(model: MaskVLM, captions: list[str], tokenizer: Tokenizer, precision: str = "auto") -> TextFeatures:
    """Encode a batch of captions. Longer ones are truncated. `precision` is auto, bf16 or fp32."""
    device, length = next(model.parameters()).device, model.config.text_length
    tokens, starts = packed_tokens(captions, tokenizer, length)
    longest = int(starts.diff().max())
    with autocast(device, precision):
        w = encode_tokens(model, tokens.to(device), starts.to(device), longest)
        return TextFeatures(w, model.embed_text(w.first()))


@torch.no_grad()
def match_log_odds(
    model: MaskVLM,
    v: Tensor,
    w: PackedText,
    images: Tensor,
    texts: Tensor,
    precision: str = "auto",
    rows: int | None = None,
) -> Tensor:
    """ITM's log-odds of a match for R pairs, float32 (R,) on the device.

    Pair r is image images[r] of v (B, 1+N, C) and caption texts[r] of w, both int64 (R,). Keys and values of an image
    or a caption are computed once, whatever the number of its pairs.

    Args:
        rows: number of tokens of all pairs' captions. Without it, the host waits for the device to count them.
    """
    device = next(model.parameters()).device
    if rows is None:
        rows = int(w.packing.lengths.cpu()[texts.cpu()].sum())
    with autocast(device, precision):
        fused = fuse_pairs(model, v, w, images.to(device), texts.to(device), max_rows=rows)
        logits = model.matching_logits(*fused).float()
    return logits[:, 1] - logits[:, 0]


def rerank_scores(model: MaskVLM, similarity: Tensor, log_odds: Tensor | float) -> Tensor:
    """Scores that order candidates by ITC and ITM together, float64: the ITC logit plus ITM's log-odds.

    ITM's negatives are drawn from ITC's softmax, so its log-odds estimate the log-ratio of the true pairs to ITC's
    distribution, and the sum is the log-probability of a pair up to a constant of the query.

    Args:
        similarity: cosine similarity of the contrastive embeddings of each pair, any shape.
        log_odds: ITM's log-odds that each pair belongs together, of the same shape; 0 without ITM.
    """
    return model.log_scale.exp().item() * similarity.double() + log_odds
