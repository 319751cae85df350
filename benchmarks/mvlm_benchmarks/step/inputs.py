"""A synthetic batch for the step benchmark, in the loader's packed form and in a collator's padded form.

Shape legend: B pairs, N patches, K masked patches, T packed tokens, L tokens of the longest caption, S image side.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.model.encoders import masked_patches
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import mask_tokens
from mvlm.objectives.losses import contrastive_logits
from mvlm.objectives.negatives import NegativeSampling
from mvlm_dataloading import Batch, Masks
from mvlm_dataloading.loader.masking import draw_patch_masks, draw_token_masks

CLS, PAD, SEP = 0, 1, 2  # RoBERTa's own ids
FIRST_WORD = 5  # after RoBERTa's special ids, and [MASK] of small vocabularies


class PaddedBatch(NamedTuple):
    """A batch as users of transformers have it. A collator makes it once per batch, so it is not timed."""

    images: Tensor
    """uint8 (B, 3, S, S), images of the batch."""
    ids: Tensor
    """int64 (B, L), padded with PAD at the end."""
    masked_ids: Tensor
    """int64 (B, L), with [MASK] at masked positions."""
    labels: Tensor
    """int64 (B, L), the original token at masked positions, -100 at all others."""
    attention_mask: Tensor
    """int64 (B, L), 1 = a token, 0 = padding."""
    masked_patches: Tensor
    """bool (B, N), True = masked."""
    negative_texts: Tensor
    """int64 (B,), the mismatching caption of each image for ITM."""
    negative_images: Tensor
    """int64 (B,), the mismatching image of each caption for ITM."""


def make_batch(config: MaskVLMConfig, lengths: np.ndarray, seed: int = 0) -> tuple[Batch, Masks]:
    """Make noise images and random captions of these lengths (B,). All images and captions have different ids."""
    count, side = len(lengths), config.image_size
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])  # (B+1,)
    tokens = rng.integers(FIRST_WORD, config.vocab_size, size=starts[-1])
    tokens[tokens == config.mask_token_id] = FIRST_WORD
    tokens[starts[:-1]], tokens[starts[1:] - 1] = CLS, SEP
    ids = np.arange(count)
    patch_ids = draw_patch_masks(seed, 0, ids, image_size=side, masking=config)
    token_ids = draw_token_masks(seed, 0, ids, lengths, ratio=config.text_mask_ratio)
    batch = Batch(
        images=torch.from_numpy(rng.integers(0, 256, size=(count, 3, side, side), dtype=np.uint8)),
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_length=int(lengths.max()),
        image_id=torch.from_numpy(ids),
        text_id=torch.from_numpy(ids),
        sample_id=torch.from_numpy(ids),
    )
    return batch, Masks(patch_ids=torch.from_numpy(patch_ids), token_ids=torch.from_numpy(token_ids))


@torch.no_grad()
def draw_negatives(model: MaskVLM, batch: Batch, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw ITM's negatives as the model does at this seed and step: texts and images, int64 (B,) each."""
    w, _ = model.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)
    image, text = model.embed_image(model.encode_image(batch.images)), model.embed_text(w)  # (B, E)
    logits = contrastive_logits(image, text, model.log_scale)
    negatives = NegativeSampling(batch.image_id, batch.text_id, seed, step).draw_both(logits)
    return negatives.texts, negatives.images


def pad_batch(config: MaskVLMConfig, batch: Batch, masks: Masks, texts: Tensor, images: Tensor) -> PaddedBatch:
    """Pad captions to the longest, for the baselines. `texts` and `images` are the negatives, int64 (B,) each."""
    lengths = batch.cu_seqlens.diff()
    is_token = torch.arange(batch.max_length, device=lengths.device) < lengths[:, None]  # (B, L)
    labels = torch.full_like(batch.tokens, -100)
    labels[masks.token_ids] = batch.tokens[masks.token_ids]

    def pad(packed: Tensor, filler: int) -> Tensor:
        """Pad packed values: (T,) -> (B, L)."""
        padded = torch.full(is_token.shape, filler, dtype=packed.dtype, device=packed.device)
        padded[is_token] = packed
        return padded

    return PaddedBatch(
        images=batch.images,
        ids=pad(batch.tokens, PAD),
        masked_ids=pad(mask_tokens(batch.tokens, masks.token_ids, config.mask_token_id), PAD),
        labels=pad(labels, -100),
        attention_mask=is_token.long(),
        masked_patches=masked_patches(masks.patch_ids, config.num_patches),
        negative_texts=texts,
        negative_images=images,
    )
