"""The fast implementation: the losses and gradients of `mvlm.model.plain`, with about a fifth less work.

`Implementation` says what the functions of both take and return. Nothing is approximated. Work is skipped if its
result is unused or already known:

- Padding: text is packed in the encoder, in both cross-modality encoders, and at the LM head.
- Each encoder runs once, over unmasked and masked inputs together. Patches are projected once.
- Keys and values of an encoder's output are computed once per cross-attention layer. The reconstruction and the three
  pairings of ITM share them in place.
- ITM reads only [CLS], so the last block computes no other row. The part of block 0 that does not depend on the
  partner runs once per image or caption, not once per pair.
- The last block of the decoder, the pixel head, the last block before the LM head, and the head itself compute only
  masked rows. The full logits never exist in memory, and predicted pixels only until their loss is known.

In this order: the encoders, the losses, pairs, answers of a trained model (matches of pairs, and reconstructions of
masked inputs), and the attention of all of them. `attend_self` and `attend_cross` make the functions that a block calls
for its attention.

Shape legend: B batch, N patches, L rows, T packed tokens, M masked tokens, K masked patches, R pairs or query
sequences, C width, H heads, D head width, V vocabulary, P patch side, S image side, A tokens of each of R captions.
"""

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import compute_dtype
from mvlm.model.attention import Attend, Attention, Branch, Residual
from mvlm.model.attention_backends import image_attention, text_attention
from mvlm.model.encoders import (
    CrossBlock,
    CrossEncoder,
    ImageEncoder,
    KeyValueCache,
    SelectRows,
    masked_patches,
    visible_patches,
    visible_rows,
)
from mvlm.model.implementation import MASKED, PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import (
    PackedText,
    Packing,
    mask_tokens,
    pack_two,
    room_for,
    round_up_length,
    second_of_two,
)
from mvlm.model.towers.text import TextTower
from mvlm.model.towers.timm_tower import TimmTower
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm.objectives.losses import masked_targets
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import gather_patches, masked_pixel_loss, place_tokens


def encode(model: MaskVLMNetwork, batch: Batch, masks: Masks | None, masked: Collection[str] = MASKED) -> Streams:
    """Encode the unmasked and the masked images and captions of a batch, in one pass of each encoder."""
    if masks is None:
        v, w = encode_unmasked(model, batch)
        return Streams(v, None, w, None, make_caches(v, w))
    images, texts = (name in masked for name in MASKED)
    if model.config.drop_masked:
        v, vm = encode_visible_images(model, batch.images, masks.patch_ids, images)
    else:
        v, vm = encode_images(model, project_patches(model, batch.images), masks.patch_ids if images else None)
    w, wm = encode_texts(model, batch, masks.token_ids if texts else None)
    caches = partners = make_caches(v, w)
    if model.config.mask_partner and vm is not None and wm is not None:
        partners = make_caches(vm, wm)
    return Streams(v, vm, w, wm, caches, partners)


def encode_unmasked(model: MaskVLMNetwork, batch: Batch) -> tuple[Tensor, PackedText]:
    text = encode_tokens(model, batch.tokens, batch.cu_seqlens, batch.max_length)
    return encode_pixels(model, batch.images), text


def encode_pixels(model: MaskVLMNetwork, images: Tensor) -> Tensor:
    return encode_patches(model, project_patches(model, images))


def encode_patches(model: MaskVLMNetwork, patches: Tensor, patch_ids: Tensor | None = None) -> Tensor:
    """Encode projected patches (B, N, C) to features (B, 1+N, C), [CLS] first.

    patch_ids: int64 (B, K), masked patches; None: none is masked.
    """
    encoder, total = model.image_encoder, patches.shape[1]
    if isinstance(encoder, TimmTower):
        return encoder.run(patches if patch_ids is None else encoder.hide(patches, masked_patches(patch_ids, total)))
    parameters = (encoder.mask_token, encoder.positions(), encoder.cls_token)
    if patch_ids is None or not model.config.hides_by_dropping:
        hidden = None if patch_ids is None else masked_patches(patch_ids, total)  # (B, N), True = masked
        x = encoder.run(place_tokens(patches, *parameters, masked=hidden), attend_self(None))
        return encoder.add_output_positions(x)
    visible = visible_patches(patch_ids, total)  # (B, N-K)
    return with_mask_tokens(encoder, encode_visible(encoder, select_within(patches, visible), visible), visible)


def encode_visible(encoder: ImageEncoder, patches: Tensor, visible: Tensor) -> Tensor:
    """Encode projected patches (B, K, C) alone to features (B, 1+K, C), [CLS] first.

    visible: int64 (B, K), number of each of these patches in its image.
    """
    placed = place_tokens(
        patches, encoder.mask_token, encoder.positions(), encoder.cls_token, visible_ids=visible
    )  # (B, 1+N, C)
    rows = F.pad(1 + visible, (1, 0))  # [CLS] too, also where no patch is visible
    return encoder.run(select_within(placed, rows), attend_self(None))


def with_mask_tokens(encoder: ImageEncoder, x: Tensor, visible: Tensor) -> Tensor:
    """Insert mask tokens for hidden patches, like `ImageEncoder.with_mask_tokens`, by one kernel.

    x (B, 1+K, C), [CLS] and the K visible patches, whose places are visible int64 (B, K) -> (B, 1+N, C).
    """
    positions = encoder.positions()  # (1+N, C)
    placed = place_tokens(x[:, 1:], encoder.mask_token, positions, encoder.cls_token, visible_ids=visible)
    # place_tokens makes row 0 from the parameter cls_token. [CLS] has been encoded here, so its row replaces row 0.
    return encoder.add_output_positions(torch.cat([x[:, :1] + positions[0], placed[:, 1:]], dim=1))


def encode_visible_images(
    model: MaskVLMNetwork, images: Tensor, patch_ids: Tensor, rebuilds: bool
) -> tuple[Tensor, Tensor | None]:
    """Encode only the visible patches of images, once, for the unmasked and the masked stream.

    patch_ids: int64 (B, K), masked patches. Returns v (B, 1+N-K, C), and vm (B, 1+N, C) with mask tokens at the masked
    patches, or None unless `rebuilds`.
    """
    encoder = model.image_encoder
    assert isinstance(encoder, ImageEncoder)
    visible = visible_patches(patch_ids, model.config.num_patches)
    x = encode_visible(encoder, project_patches(model, images, visible), visible)
    return encoder.add_output_positions(x, visible), with_mask_tokens(encoder, x, visible) if rebuilds else None


def encode_tokens(model: MaskVLMNetwork, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> PackedText:
    model.check_captions(tokens, cu_seqlens, max_length)
    packing = Packing(cu_seqlens, round_up_length(max_length), len(tokens))
    return PackedText(run_text_encoder(model, tokens, packing), packing)


def run_text_encoder(model: MaskVLMNetwork, tokens: Tensor, packing: Packing) -> Tensor:
    """Packed tokens int64 (T,) -> features (T, C)."""
    encoder = model.text_encoder
    if isinstance(encoder, TextTower):
        return encoder.packed(tokens, packing)
    return encoder.run(tokens, packing.position, attend_self(packing))


def project_patches(model: MaskVLMNetwork, images: Tensor, patch_ids: Tensor | None = None) -> Tensor:
    """Images uint8 (B, 3, S, S) -> projected patches (B, N, C), or only those of patch_ids int64 (B, K): (B, K, C)."""
    encoder = model.image_encoder
    if isinstance(encoder, TimmTower):
        return encoder.project(images)
    patches = gather_patches(
        images,
        patch_ids,
        model.config.patch_size,
        mean=encoder.mean.flatten(),
        std=encoder.std.flatten(),
        dtype=compute_dtype(encoder.patch_projection.weight),
    )
    return encoder.patch_projection(patches)


def encode_images(model: MaskVLMNetwork, patches: Tensor, patch_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Encode projected patches (B, N, C) without and with masks. Returns v and vm, (B, 1+N, C) each.

    patch_ids: int64 (B, K), masked patches; without them vm is None and costs nothing.
    """
    if patch_ids is None or model.config.hides_by_dropping:
        return encode_patches(model, patches), None if patch_ids is None else encode_patches(model, patches, patch_ids)
    encoder, total = model.image_encoder, patches.shape[1]
    hidden = masked_patches(patch_ids, total)  # (B, N), True = masked
    if isinstance(encoder, TimmTower):
        v, vm = encoder.run(torch.cat([patches, encoder.hide(patches, hidden)])).chunk(2)
        return v, vm
    parameters = (encoder.mask_token, encoder.positions(), encoder.cls_token)
    both = place_tokens(patches, *parameters, masked=hidden, with_unmasked=True)  # (2B, 1+N, C)
    v, vm = encoder.add_output_positions(encoder.run(both, attend_self(None))).chunk(2)
    return v, vm


def encode_texts(model: MaskVLMNetwork, batch: Batch, hidden: Tensor | None) -> tuple[PackedText, PackedText | None]:
    """Encode captions without and with masks. Returns w and wm.

    hidden: int64 (M,), positions of the masked tokens; without them wm is None and costs nothing.
    """
    if hidden is None:
        return encode_tokens(model, batch.tokens, batch.cu_seqlens, batch.max_length), None
    model.check_captions(batch.tokens, batch.cu_seqlens, batch.max_length)
    masked = mask_tokens(batch.tokens, hidden, model.config.mask_token_id)
    tokens, packing = pack_two(batch.tokens, masked, batch.cu_seqlens, round_up_length(batch.max_length))
    x = run_text_encoder(model, tokens, packing)
    first = Packing(batch.cu_seqlens, packing.max_length, len(batch.tokens))
    return PackedText(x[: first.total], first), second_of_two(x, packing)


def language_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> tuple[Tensor, Tensor]:
    assert streams.masked_text is not None
    assert streams.partner_caches is not None
    targets = masked_targets(batch, masks)
    x = fuse_tokens(model, streams.partner_caches.image, streams.masked_text, masks.token_ids)  # (M, C)
    head = model.language_head
    return linear_cross_entropy(head.transform(x), head.vocabulary.weight, head.vocabulary.bias, targets)


def image_loss(model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> Tensor:
    assert streams.masked_image is not None
    assert streams.partner_caches is not None
    head, encoder = model.pixel_head, model.image_encoder
    rebuilt = masks.patch_ids[:, : model.config.rebuilt_patches]
    x = masked_patch_features(model, streams.masked_image, streams.partner_caches.text, masks, rebuilt)
    of_patches = batch.images, rebuilt, model.config.patch_size
    mean, std = encoder.mean.flatten(), encoder.std.flatten()
    normalized = head.statistics is not None
    loss = masked_pixel_loss(
        head(x), *of_patches, mean=mean, std=std, kind=model.config.mim_loss, normalize_target=normalized
    )
    if not normalized:
        return loss
    return loss + head.statistics_gradient(x, gather_patches(*of_patches, mean=mean, std=std, dtype=loss.dtype))


def masked_patch_features(
    model: MaskVLMNetwork, vm: Tensor, text: KeyValueCache, masks: Masks, rebuilt: Tensor | None = None
) -> Tensor:
    """Features (B, R, C) of masked patches, for the pixel head, by the image cross-modality encoder and the decoder.

    Args:
        vm: (B, 1+N, C), features of the masked images, which attend to the captions.
        text: cache of the captions.
        rebuilt: int64 (B, R), some of the masked patches. Default: all.
    """
    rows, keys = Residual(vm), None
    rebuilt = masks.patch_ids if rebuilt is None else rebuilt

    def select(rows: Tensor) -> Tensor:
        return select_within(rows, 1 + rebuilt)  # (B, 1+N, C) -> (B, R, C)

    if model.config.mim_rows == "masked":
        rows = Residual(select(vm))
        keys = select_within(vm, visible_rows(masks.patch_ids, model.config.num_patches))  # (B, 1+N-K, C)
    for block in model.image_cross.layers:
        rows = block(rows, attend_self(None), attend_cross(block, None, text), keys=keys)
    rows = Residual(model.image_cross.finish(rows))
    *early, last = model.image_decoder.layers
    for block in early:
        rows = block(rows, attend_self(None), attend_cross(block, None, text), keys=keys)
    if keys is None:
        rows = last(rows, attend_self(None, Selection(select)), attend_cross(last, None, text), select)
    else:
        rows = last(rows, attend_self(None), attend_cross(last, None, text), keys=keys)
    return model.image_decoder.finish(rows)


def fuse_pairs(
    model: MaskVLMNetwork,
    v: Tensor,
    text: PackedText,
    images: Tensor,
    texts: Tensor,
    caches: PairCaches | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    caches = caches or make_caches(v, text)
    packing = text.packing.with_rounded_length()
    pair_packing, rows = packing.select(texts, room_for(packing, texts, max_rows, compute_dtype(v)))
    image = _encode_pairs(model.image_cross, v, None, caches.text, texts, images, None)
    caption = _encode_pairs(model.text_cross, text.rows, packing, caches.image, images, rows, pair_packing)
    return image, caption


def fuse_tokens(
    model: MaskVLMNetwork,
    image: KeyValueCache,
    text: PackedText,
    tokens: Tensor | None = None,
    images: Tensor | None = None,
    texts: Tensor | None = None,
    total: int = 0,
) -> Tensor:
    encoder, rows, packing = model.text_cross, Residual(text.rows), text.packing
    pairs, repeat = packing, None
    if texts is not None:
        pairs, of_text = packing.select(texts, total)
        repeat = partial(select_rows, rows=of_text)
    *early, last = encoder.layers
    for block in encoder.layers if tokens is None else early:
        # Block 0's self-attention does not depend on the image, so it runs once per caption.
        rows = block(rows, attend_self(packing), attend_cross(block, pairs, image, images), select_between=repeat)
        packing, repeat = pairs, None
    if tokens is None:
        return encoder.finish(rows)
    if repeat is not None:  # there is no block before the last one
        rows, packing = Residual(repeat(rows.x)), pairs
    read = _reading(tokens, pairs)
    cross = attend_cross(last, read.packing, image, images)
    return encoder.finish(last(rows, attend_self(packing, read), cross, select=read.select))


def _reading(tokens: Tensor, packing: Packing) -> "Selection":
    """`Selection` of some rows of a packing.

    tokens: numbers of the rows, int64 (M,), ascending, or (R, A), A of each caption.
    """

    def select(rows: Tensor) -> Tensor:
        return rows.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)  # (T, C) -> (M, C) or (R, A, C)

    if tokens.ndim == 2:
        return Selection(select)
    # The rows rise, so those of a caption are consecutive.
    bounds = torch.searchsorted(tokens, packing.cu_seqlens.long()).int()  # (R+1,)
    return Selection(select, Packing(bounds, packing.max_length, len(tokens)))


def token_loss(model: MaskVLMNetwork, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    head = model.language_head
    vocabulary = head.vocabulary
    loss, accuracy = linear_cross_entropy(head.transform(x), vocabulary.weight, vocabulary.bias, targets, weights)
    return loss, accuracy.nan_to_num()


def _encode_pairs(
    encoder: CrossEncoder,
    x: Tensor,
    packing: Packing | None,
    cache: KeyValueCache,
    key_index: Tensor,
    rows: Tensor,
    pair_packing: Packing | None,
) -> Tensor:
    """Encode R pairs by a cross-modality encoder: a sequence of x, and its partner in the cache. Returns [CLS] (R, C).

    Args:
        x: (B, L, C), or packed (T, C) with `packing`.
        key_index: int64 (R,), the partner of each of the R sequences in the cache.
        rows: indices into x. Not packed: int64 (R,), one sequence per pair. Packed: int64 (T',), rows of the selected
            captions, T' = pair_packing.total.
        pair_packing: layout of these rows if x is packed, else None.
    """

    def expand(y: Tensor) -> Tensor:
        return select_rows(y, rows)

    def first(y: Tensor) -> Tensor:
        return y.index_select(0, pair_packing.cu_seqlens[:-1]) if pair_packing else y[:, 0]  # (R, C)

    def attend_self_first(attention: Attention, y: Tensor) -> Branch:
        if pair_packing is None:
            return attention.attend_first_row(first(y), y, None)
        return attention.attend_first_row(first(y), pair_packing.pad(y), pair_packing.key_mask)

    *early, last = encoder.layers
    stream = Residual(x if early else expand(x))
    for number, block in enumerate(early):
        cross = attend_cross(block, pair_packing, cache, key_index)
        if number == 0:
            # Block 0's self-attention does not depend on the partner, so it runs once per image or caption; only its
            # result is expanded to pairs.
            stream = block(stream, attend_self(packing), cross, select_between=expand)
        else:
            stream = block(stream, attend_self(pair_packing), cross)

    # Made outside the block, for the reason given in `attend_cross`.
    cross = attend_cross(last, None, cache, key_index)

    def attend_cross_first(attention: Attention, y: Tensor) -> Branch:
        branch = cross(attention, y.unsqueeze(1))
        return branch._replace(rows=branch.rows.squeeze(1))

    return encoder.finish(last(stream, attend_self_first, attend_cross_first, select=first))


def make_caches(v: Tensor, text: PackedText) -> PairCaches:
    return PairCaches(KeyValueCache(v), KeyValueCache(text.rows, text.packing.with_rounded_length()))


def encode_masked(model: MaskVLMNetwork, batch: Batch, masks: Masks) -> tuple[Tensor, PackedText]:
    """Encode only the masked images, with mask tokens, and the masked captions: vm (B, 1+N, C) and wm."""
    vm = encode_patches(model, project_patches(model, batch.images), masks.patch_ids)
    tokens = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)
    return vm, encode_tokens(model, tokens, batch.cu_seqlens, batch.max_length)


def reconstruct(
    model: MaskVLMNetwork, vm: Tensor, wm: PackedText, v: Tensor, w: PackedText, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor]:
    """Logits (M, V) of the LM head for masked tokens, and features (B, K, C) of masked patches for the pixel head.

    The masked captions wm attend to the images v (B, 1+N, C), the masked images vm (B, 1+N, C) to the captions w.
    """
    caches = make_caches(v, w)
    tokens = fuse_tokens(model, caches.image, wm, masks.token_ids)
    return model.language_head(tokens), masked_patch_features(model, vm, caches.text, masks)


class Selection(NamedTuple):
    """A choice of rows of a stream, in any order and with repetitions."""

    select: SelectRows
    packing: Packing | None = None
    """Bounds of the sequences among the selected rows; None if the rows are not packed."""


def attend_self(packing: Packing | None, read: Selection | None = None) -> Attend:
    """Make the function that computes a block's self-attention, of rows (B, L, C), or packed (T, C) with `packing`.

    With `read`, only its rows are queries. The function may be called with keys (B, V, C): rows to attend to in place
    of the rows themselves.
    """

    def attend(attention: Attention, y: Tensor, keys: Tensor | None = None) -> Branch:
        # Cast once, before the projections: autocast would cast y for each of them and save every copy.
        y = y.to(compute_dtype(y))
        if keys is not None:
            q, (k, v) = attention.queries(y), attention.keys_values(keys.to(y.dtype))
        elif read is None:
            q, k, v = attention.queries_keys_values(y)
        else:
            q, (k, v) = attention.queries(read.select(y)), attention.keys_values(y)
        if read is None and packing is None and keys is None:
            heads = image_attention(q, k, v, attention.image_backend)
        else:
            # Selected queries of images come here too: text_attention takes sides of different lengths.
            queries = packing if read is None else read.packing
            heads = text_attention(q, k, v, queries, packing, None, attention.text_backend)
        return attention.project_out(heads)

    return attend


def attend_cross(
    block: CrossBlock, packing: Packing | None, cache: KeyValueCache, key_index: Tensor | None = None
) -> Attend:
    """Make the function that computes a block's cross-attention, to the sequences of a key/value cache.

    Args:
        packing: layout of the rows that attend if they are packed (T, C); None for (R, L, C).
        key_index: int64 (R,), the partner of each sequence in the cache. None: sequence r attends to sequence r.
    """
    # Not inside `attend`: activation checkpointing calls that again in backward. It would find the cache filled, and
    # recompute fewer tensors than the forward pass saved.
    k, v = cache.keys_values(block)

    def attend(attention: Attention, y: Tensor) -> Branch:
        q = attention.queries(y)
        return attention.project_out(text_attention(q, k, v, packing, cache.packing, key_index, attention.text_backend))

    return attend


def select_within(x: Tensor, positions: Tensor) -> Tensor:
    """Select rows positions int64 (B, K), all different, of each sequence of x (B, L, C) -> (B, K, C)."""
    # index_select over flattened rows is faster than `gather`, which needs an index for every feature.
    rows = positions + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, positions.shape)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], with a backward that adds up repeated rows in a fixed order."""
    # The backward of index_select is deterministic on a CPU and not on CUDA; that of indexing is the reverse.
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]
