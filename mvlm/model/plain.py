"""The plain plan: one pretraining step written as the method reads, every stream on its own. It is the specification.

Shape legend: B batch, N patches, T packed tokens, L tokens of the longest caption, M masked tokens, K masked patches,
C width, R pairs of an image and a text.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mvlm.model.encoders import PackedText
from mvlm.model.patches import mask_tokens, masked_patches, visible_patches
from mvlm.objectives import losses as objectives
from mvlm_dataloading import Batch, Masks

if TYPE_CHECKING:
    from mvlm.model.maskvlm import MaskVLM


class Streams(NamedTuple):
    """What the two encoders give for one batch."""

    image: Tensor
    """v (B, 1+N, C), features of the whole images, [CLS] first."""
    masked_image: Tensor
    """vm (B, 1+N, C), of the masked ones."""
    text: PackedText
    """w, features of the whole captions."""
    masked_text: PackedText
    """wm, of the masked ones."""
    memories: Any = None
    """What the fast plan has made of image and text already."""


def encode(model: "MaskVLM", batch: Batch, masks: Masks) -> Streams:
    """Four passes: whole and masked, image and text."""
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


def encode_whole(model: "MaskVLM", batch: Batch) -> tuple[Tensor, PackedText]:
    """v (B, 1+N, C) and w of the whole pictures and captions alone."""
    image = model.encode_image(batch.images)
    return image, model.encode_text_packed(batch.tokens, batch.cu_seqlens, batch.max_length)


def reconstruction_losses(
    model: "MaskVLM", streams: Streams, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor, Tensor]:
    """MLM, the mean over the batch's M masked tokens; MIM, the mean over its B x K masked patches; MLM's accuracy."""
    (w, key_mask), (wm, _) = streams.text.padded(), streams.masked_text.padded()  # (B, L, C), (B, L)
    logits = model.fill_mask(streams.image, wm, key_mask, batch.cu_seqlens, masks.token_ids)  # (M, V)
    targets = batch.tokens[masks.token_ids]
    pixels = model.reconstruct(streams.masked_image, w, key_mask, masks.patch_ids)  # (B, K, 3*P*P)
    return (
        objectives.masked_language_loss(logits, targets),
        objectives.masked_image_loss(pixels, model.patch_targets(batch.images, masks.patch_ids)),
        objectives.hits(logits, targets).mean(),
    )


def match_pairs(
    model: "MaskVLM", v: Tensor, text: PackedText, images: Tensor, texts: Tensor, memories: Any = None
) -> Tensor:
    """ITM logits (R, 2) of R pairs: rows images int64 (R,) of v (B, 1+N, C) with captions texts int64 (R,) of text."""
    w, key_mask = text.padded()
    # Not v[images]: on a CPU its backward adds up the gradients of rows read twice in whatever order threads come.
    return model.match(v.index_select(0, images), w.index_select(0, texts), key_mask[texts])
