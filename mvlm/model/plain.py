"""The plain implementation: one training step as the method states it, each stream encoded separately.

It is the specification; `mvlm.model.fast` has to give the same losses and gradients.

Shape legend: B batch, N patches, T packed tokens, L tokens of the longest caption, M masked tokens, K masked patches,
C width, R pairs of an image and a text.
"""

from torch import Tensor

from mvlm.model.implementation import PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, mask_tokens
from mvlm.model.patches import masked_patches, visible_patches
from mvlm.objectives import losses
from mvlm_dataloading import Batch, Masks


def encode(model: MaskVLMNetwork, batch: Batch, masks: Masks) -> Streams:
    """Encode the unmasked and the masked images and captions, in four passes."""
    config, patch_ids = model.config, masks.patch_ids
    hidden = mask_tokens(batch.tokens, masks.token_ids, config.mask_token_id)  # (T,)
    if config.drop_masked:
        masked = model.image_encoder.forward_visible(batch.images, visible_patches(patch_ids, config.num_patches))
    else:
        masked = model.encode_image(batch.images, masked_patches(patch_ids, config.num_patches))
    return Streams(
        model.encode_image(batch.images),
        masked,
        model.encode_text_packed(batch.tokens, batch.cu_seqlens, batch.max_length),
        model.encode_text_packed(hidden, batch.cu_seqlens, batch.max_length),
    )


def encode_unmasked(model: MaskVLMNetwork, batch: Batch) -> tuple[Tensor, PackedText]:
    """Encode only the unmasked images and captions: v (B, 1+N, C) and w."""
    image = model.encode_image(batch.images)
    return image, model.encode_text_packed(batch.tokens, batch.cu_seqlens, batch.max_length)


def language_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> tuple[Tensor, Tensor]:
    """MLM, the mean over the batch's M masked tokens, and its accuracy."""
    (_, key_mask), (wm, _) = streams.text.padded(), streams.masked_text.padded()  # (B, L), (B, L, C)
    logits = model.fill_mask(streams.image, wm, key_mask, batch.cu_seqlens, masks.token_ids)  # (M, V)
    targets = batch.tokens[masks.token_ids]
    return losses.masked_language_loss(logits, targets), losses.correct_top1(logits, targets).mean()


def image_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> Tensor:
    """MIM, the mean over the batch's B x K masked patches."""
    w, key_mask = streams.text.padded()  # (B, L, C), (B, L)
    pixels = model.reconstruct(streams.masked_image, w, key_mask, masks.patch_ids)  # (B, K, 3*P*P)
    return losses.masked_image_loss(pixels, model.patch_targets(batch.images, masks.patch_ids))


def fuse_pairs(
    model: MaskVLMNetwork,
    v: Tensor,
    text: PackedText,
    images: Tensor,
    texts: Tensor,
    caches: PairCaches | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """[CLS] of both cross-modality encoders, image and text (R, C) each, for pairs of an image and a caption.

    Pair r is image images[r] of v (B, 1+N, C) and caption texts[r] of text; both int64 (R,).
    """
    w, key_mask = text.padded()
    # index_select, not v[images]: on a CPU the backward of indexing adds up repeated rows in thread order.
    return model.fuse(v.index_select(0, images), w.index_select(0, texts), key_mask[texts])
