"""The plain implementation: one training step as the method states it, each stream encoded separately.

It is the specification; `mvlm.model.fast` has to give the same losses and gradients. `Implementation` says what the
functions of both take and return.

Shape legend: B batch, N patches, T packed tokens, L tokens of the longest caption, M masked tokens, K masked patches,
C width, S image side, A tokens of each of R captions, R pairs of an image and a text.
"""

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor

from mvlm.model.encoders import KeyValueCache, visible_patches
from mvlm.model.implementation import MASKED, PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, mask_tokens
from mvlm.objectives import losses
from mvlm.objectives.losses import masked_targets
from mvlm_dataloading import Batch, Masks


def encode(model: MaskVLMNetwork, batch: Batch, masks: Masks | None, masked: Collection[str] = MASKED) -> Streams:
    """Encode the unmasked and the masked images and captions, each in a pass of its own."""
    if masks is None:
        image, text = encode_unmasked(model, batch)
        return Streams(image, None, text, None)
    images, texts = (name in masked for name in MASKED)
    encoder, total = model.image_encoder, model.config.num_patches
    masked_text = None
    if model.config.drop_masked:
        visible = visible_patches(masks.patch_ids, total)
        rows = encoder.forward_visible(batch.images, visible)
        image = encoder.add_output_positions(rows, visible)
        masked_image = encoder.with_mask_tokens(rows, visible) if images else None
    else:
        image = encoder(batch.images)
        masked_image = model.encode_masked_image(batch.images, masks.patch_ids) if images else None
    text = model.encode_text_packed(batch.tokens, batch.cu_seqlens, batch.max_length)
    if texts:
        hidden = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)  # (T,)
        masked_text = model.encode_text_packed(hidden, batch.cu_seqlens, batch.max_length)
    return Streams(image, masked_image, text, masked_text)


def encode_unmasked(model: MaskVLMNetwork, batch: Batch) -> tuple[Tensor, PackedText]:
    image = model.image_encoder(batch.images)
    return image, model.encode_text_packed(batch.tokens, batch.cu_seqlens, batch.max_length)


def encode_pixels(model: MaskVLMNetwork, images: Tensor) -> Tensor:
    return model.encode_image(images)


def encode_tokens(model: MaskVLMNetwork, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> PackedText:
    return model.encode_text_packed(tokens, cu_seqlens, max_length)


def language_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> tuple[Tensor, Tensor]:
    assert streams.masked_text is not None
    wm, key_mask = streams.masked_text.padded()  # (B, L, C), (B, L)
    targets = masked_targets(batch, masks)
    image = streams.masked_image if model.config.mask_partner else streams.image
    assert image is not None
    logits = model.fill_mask(image, wm, key_mask, batch.cu_seqlens, masks.token_ids)  # (M, V)
    return losses.masked_language_loss(logits, targets), losses.correct_top1(logits, targets).mean()


def image_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> Tensor:
    assert streams.masked_image is not None
    text = streams.masked_text if model.config.mask_partner else streams.text
    assert text is not None
    w, key_mask = text.padded()  # (B, L, C), (B, L)
    rebuilt = masks.patch_ids[:, : model.config.rebuilt_patches]  # (B, R)
    x = model.masked_features(streams.masked_image, w, key_mask, masks.patch_ids, rebuilt)  # (B, R, C)
    head, pixels = model.pixel_head, model.patch_targets(batch.images, rebuilt)  # (B, R, 3*P*P)
    loss = losses.masked_image_loss(head(x), head.target(pixels), model.config.mim_loss)
    return loss + head.statistics_gradient(x, pixels)


def fuse_pairs(
    model: MaskVLMNetwork,
    v: Tensor,
    text: PackedText,
    images: Tensor,
    texts: Tensor,
    caches: PairCaches | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    w, key_mask = text.padded()
    # index_select, not v[images]: on a CPU the backward of indexing adds up repeated rows in thread order.
    return model.fuse(v.index_select(0, images), w.index_select(0, texts), key_mask[texts])


def fuse_tokens(
    model: MaskVLMNetwork,
    image: KeyValueCache,
    text: PackedText,
    tokens: Tensor | None = None,
    images: Tensor | None = None,
    texts: Tensor | None = None,
    total: int = 0,
) -> Tensor:
    if texts is not None:
        packing, rows = text.packing.select(texts, total)
        text = PackedText(text.rows.index_select(0, rows), packing)
    w, key_mask = text.padded()
    v = image.rows if images is None else image.rows.index_select(0, images)
    x = text.packing.unpad(model.text_cross(w, v, key_mask, None))  # (T, C)
    return x if tokens is None else x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)


def token_loss(model: MaskVLMNetwork, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = losses.at_least_float32(model.language_head(x))  # (M, V)
    loss = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    return loss, (logits.argmax(1) == targets).to(logits.dtype).mean().nan_to_num()
