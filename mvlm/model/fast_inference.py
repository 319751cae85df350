"""Answers of a trained model by the fast implementation: matches of pairs, and reconstructions of masked inputs.

Shape legend: B batch, N patches, T packed tokens, M masked tokens, K masked patches, R pairs, C width, V vocabulary,
P patch side.
"""

from torch import Tensor

from mvlm.model.fast import (
    encode_patches,
    encode_tokens,
    fuse_pairs,
    make_caches,
    masked_patch_features,
    masked_token_features,
    project_patches,
)
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, mask_tokens
from mvlm_dataloading import Batch, Masks


def match_pairs(
    model: MaskVLMNetwork, v: Tensor, w: PackedText, images: Tensor, texts: Tensor, max_rows: int
) -> Tensor:
    """ITM logits (R, 2), column 1 = match. The arguments are those of `mvlm.model.fast.fuse_pairs`."""
    return model.matching_logits(*fuse_pairs(model, v, w, images, texts, max_rows=max_rows))


def encode_masked(model: MaskVLMNetwork, batch: Batch, masks: Masks) -> tuple[Tensor, PackedText]:
    """Encode only the masked images, with mask tokens, and the masked captions: vm (B, 1+N, C) and wm."""
    vm = encode_patches(model, project_patches(model, batch.images), masks.patch_ids)
    tokens = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)
    return vm, encode_tokens(model, tokens, batch.cu_seqlens, batch.max_length)


def reconstruct(
    model: MaskVLMNetwork, vm: Tensor, wm: PackedText, v: Tensor, w: PackedText, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Reconstruct masked tokens and patches: LM logits (M, V), and normalised pixels (B, K, 3*P*P).

    The masked captions wm attend to the images v (B, 1+N, C), the masked images vm (B, 1+N, C) to the captions w.
    """
    caches = make_caches(v, w)
    tokens = masked_token_features(model, wm, caches.image, masks.token_ids)
    return model.language_head(tokens), model.pixel_head(masked_patch_features(model, vm, caches.text, masks))
