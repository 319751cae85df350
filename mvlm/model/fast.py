"""The fast implementation: the losses and gradients of `mvlm.model.plain`, with about a fifth less work.

Nothing is approximated. Work is skipped where its result is unused or already known:

- Padding: text is packed in the encoder, in both cross-modality encoders, and at the LM head.
- Each encoder runs once, over unmasked and masked inputs together. Patches are projected once for both.
- Keys and values of an encoder's output are made once per cross-attention layer. The reconstruction and the three
  pairings of ITM share them in place.
- ITM reads [CLS] alone, so the last block computes no other row. The part of block 0 that does not depend on the
  partner runs once per image or caption, not once per pair.
- The last block of the decoder, the pixel head, the last block before the LM head and the head itself see masked rows
  alone. The predicted pixels and the full logits are never materialised.

Shape legend: B batch, N patches, T packed tokens, M masked tokens, K masked patches, R = 3B pairs, C width, H heads, D
head width.
"""

import torch
from torch import Tensor

from mvlm.device import compute_dtype
from mvlm.model.attention import Attention
from mvlm.model.cross_encoder import CrossEncoder, KeyValueCache
from mvlm.model.fast_attention import attend_cross, attend_self, select_rows, select_within
from mvlm.model.implementation import PairCaches, Streams
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText, Packing, mask_tokens, round_up_length
from mvlm.model.patches import masked_patches, visible_patches
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import gather_patches, linear_pixel_loss, place_tokens


def encode(model: MaskVLMNetwork, batch: Batch, masks: Masks) -> Streams:
    """One pass of each encoder over unmasked and masked inputs."""
    v, vm = _encode_images(model, batch.images, masks.patch_ids)
    w, wm = _encode_texts(model, batch, masks)
    return Streams(v, vm, w, wm, _make_caches(v, w))


def encode_whole(model: MaskVLMNetwork, batch: Batch) -> tuple[Tensor, PackedText]:
    """v (B, 1+N, C) and w of the unmasked images and captions alone."""
    image, text = model.image_encoder, model.text_encoder
    whole = place_tokens(_patch_tokens(model, batch.images), image.mask_token, image.position, image.cls_token)
    packing = Packing(batch.cu_seqlens, round_up_length(batch.max_length), len(batch.tokens))
    x = text.run(batch.tokens, packing, attend_self(packing))  # (T, C)
    return image.run(whole, attend_self(None)), PackedText(x, packing)


def _patch_tokens(model: MaskVLMNetwork, images: Tensor) -> Tensor:
    """The projected patches (B, N, C) of images uint8 (B, 3, H, W)."""
    encoder = model.image_encoder
    patches = gather_patches(
        images,
        None,
        model.config.patch_size,
        mean=encoder.mean.flatten(),
        std=encoder.std.flatten(),
        dtype=compute_dtype(encoder.patch_projection.weight),
    )  # (B, N, 3*P*P)
    return encoder.patch_projection(patches)


def _encode_images(model: MaskVLMNetwork, images: Tensor, patch_ids: Tensor) -> tuple[Tensor, Tensor]:
    """v and vm, (B, 1+N, C) each."""
    encoder, config = model.image_encoder, model.config
    tokens = _patch_tokens(model, images)
    parameters = (encoder.mask_token, encoder.position, encoder.cls_token)
    whole = place_tokens(tokens, *parameters)  # (B, 1+N, C)
    if not config.drop_masked:
        masked = masked_patches(patch_ids, config.num_patches)  # (B, N), True = hidden
        v, vm = encoder.run(
            torch.cat([whole, place_tokens(tokens, *parameters, masked=masked)]), attend_self(None)
        ).chunk(2)
        return v, vm
    visible = visible_patches(patch_ids, config.num_patches)  # (B, N-K)
    seen = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], dim=1)  # [CLS] too
    x = encoder.run(select_within(whole, seen), attend_self(None))  # (B, 1+N-K, C)
    placed = place_tokens(x[:, 1:], *parameters, visible_ids=visible)
    vm = torch.cat([x[:, :1] + encoder.position[0], placed[:, 1:]], dim=1)
    return encoder.run(whole, attend_self(None)), vm


def _encode_texts(model: MaskVLMNetwork, batch: Batch, masks: Masks) -> tuple[PackedText, PackedText]:
    """w and wm, (T, C) each."""
    encoder, total = model.text_encoder, len(batch.tokens)
    longest = round_up_length(batch.max_length)
    hidden = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)
    # Rows that belong to no caption (where totals are rounded up) must all come last, so the masked captions follow
    # the last unmasked caption, not its padding.
    end = batch.cu_seqlens[-1:].long()
    rows = torch.arange(2 * total, device=end.device)
    tokens = torch.where(rows < end, torch.cat([batch.tokens, hidden]), hidden[(rows - end).clamp(0, total - 1)])
    both = Packing(torch.cat([batch.cu_seqlens[:-1], batch.cu_seqlens + batch.cu_seqlens[-1]]), longest, 2 * total)
    x = encoder.run(tokens, both, attend_self(both))  # (2T, C)
    masked = x.index_select(0, (end + rows[:total]).clamp(max=2 * total - 1))
    packing = Packing(batch.cu_seqlens, longest, total)
    return PackedText(x[:total], packing), PackedText(masked, packing)


def reconstruction_losses(
    model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor, Tensor]:
    """MLM, the mean over the batch's M masked tokens; MIM, the mean over its B x K masked patches; MLM's accuracy."""
    caches = streams.caches or _make_caches(streams.image, streams.text)
    mlm, accuracy = _masked_language(model, streams, caches.image, batch, masks)
    return mlm, _masked_image(model, streams, caches.text, batch, masks), accuracy


def _masked_language(
    model: MaskVLMNetwork, streams: Streams, image: KeyValueCache, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor]:
    x, packing = streams.masked_text
    # Padding positions (see `pad_to_bucket`) point past the last caption and are ignored.
    bounds = torch.searchsorted(masks.token_ids, batch.cu_seqlens.long()).int()  # (B+1,)
    chosen = Packing(bounds, packing.max_length, len(masks.token_ids))

    def select(rows: Tensor) -> Tensor:
        return rows.index_select(0, masks.token_ids)  # (T, C) -> (M, C)

    *early, last = model.text_cross.layers
    for block in early:
        x = block(x, attend_self(packing), attend_cross(block, packing, image))
    x = model.text_cross.norm(
        last(x, attend_self(packing, select, chosen), attend_cross(last, chosen, image), select)
    )  # (M, C)
    targets = batch.tokens.index_select(0, masks.token_ids)
    targets = targets.masked_fill(masks.token_ids >= batch.cu_seqlens[-1], -100)
    head = model.language_head
    return linear_cross_entropy(head.transform(x), head.vocabulary.weight, head.vocabulary.bias, targets)


def _masked_image(model: MaskVLMNetwork, streams: Streams, text: KeyValueCache, batch: Batch, masks: Masks) -> Tensor:
    x = streams.masked_image

    def select(rows: Tensor) -> Tensor:
        return select_within(rows, 1 + masks.patch_ids)  # (B, 1+N, C) -> (B, K, C)

    for block in model.image_cross.layers:
        x = block(x, attend_self(None), attend_cross(block, None, text))
    x = model.image_cross.norm(x)
    *early, last = model.image_decoder.layers
    for block in early:
        x = block(x, attend_self(None), attend_cross(block, None, text))
    x = last(x, attend_self(None, select), attend_cross(last, None, text), select)
    encoder, head = model.image_encoder, model.pixel_head
    return linear_pixel_loss(
        model.image_decoder.norm(x),  # (B, K, C)
        head.weight,
        head.bias,
        batch.images,
        masks.patch_ids,
        model.config.patch_size,
        mean=encoder.mean.flatten(),
        std=encoder.std.flatten(),
    )


def match_pairs(
    model: MaskVLMNetwork,
    v: Tensor,
    text: PackedText,
    images: Tensor,
    texts: Tensor,
    caches: PairCaches | None = None,
) -> Tensor:
    """ITM logits (R, 2) of pairs: rows images int64 (R,) of v (B, 1+N, C), captions texts int64 (R,) of text.

    `caches`, if given, are those of v and text.
    """
    caches = caches or _make_caches(v, text)
    packing = _rounded_up(text.packing)
    # The device alone knows how many rows the drawn captions have together. On a CPU asking costs nothing; on a GPU it
    # would be a sync, so there the bound is taken.
    capacity = len(texts) * packing.max_length
    if texts.device.type == "cpu" and not torch.compiler.is_compiling():
        capacity = int(packing.lengths.index_select(0, texts).sum())
    chosen, rows = packing.select(texts, capacity)
    image = _first_rows(model.image_cross, v, None, caches.text, texts, images, None)
    word = _first_rows(model.text_cross, text.rows, packing, caches.image, images, rows, chosen)
    return model.matching_head(image * word)


def _first_rows(
    encoder: CrossEncoder,
    x: Tensor,
    packing: Packing | None,
    cache: KeyValueCache,
    key_index: Tensor,
    drawn: Tensor,
    chosen: Packing | None,
) -> Tensor:
    """[CLS] (R, C) of R sequences drawn from x; sequence r attends to sequence key_index[r] of the cache.

    x is (B, L, C) padded, and drawn int64 (R,) are its sequences. Or x is packed (T, C) with `packing`, drawn are the
    rows of the R sequences, and `chosen` is their layout.
    """

    def draw(rows: Tensor) -> Tensor:
        return select_rows(rows, drawn)

    def first(rows: Tensor) -> Tensor:
        return rows.index_select(0, chosen.cu_seqlens[:-1]) if chosen else rows[:, 0]  # (R, C)

    def own_first(attention: Attention, y: Tensor) -> Tensor:
        return attention.first_rows(first(y), chosen.pad(y) if chosen else y, chosen.exists if chosen else None)

    *early, last = encoder.layers
    if not early:
        x = draw(x)
    for number, block in enumerate(early):
        # Block 0's self-attention does not depend on the partner, so it runs once per image or caption; only its result
        # is expanded to pairs.
        own, between = (attend_self(packing), draw) if number == 0 else (attend_self(chosen), None)
        x = block(x, own, attend_cross(block, chosen, cache, key_index), between=between)

    # Made outside the block: activation checkpointing calls the block again in backward, and the cache must not.
    read = attend_cross(last, None, cache, key_index)

    def other(attention: Attention, y: Tensor) -> Tensor:
        return read(attention, y.unsqueeze(1)).squeeze(1)

    return encoder.norm(last(x, own_first, other, select=first))


def _make_caches(v: Tensor, text: PackedText) -> PairCaches:
    packing = _rounded_up(text.packing)
    return PairCaches(KeyValueCache(v), KeyValueCache(text.rows, packing))


def _rounded_up(packing: Packing) -> Packing:
    """The layout with a longest length that repeats from batch to batch."""
    return packing.with_max_length(round_up_length(packing.max_length))
