"""The fast plan: what `mvlm.model.plain` computes, on the same weights, with about a fifth of the work left out.

Nothing is approximated. What is not computed is what nobody reads, or what was computed already:

- padding: text is packed in the encoder, in both cross-modality encoders, and at the LM head;
- each encoder runs once, over whole and masked inputs together, and patches are projected once for both;
- keys and values of an encoder's output are made once per cross-attention layer and read in place by all who need them:
  the reconstruction and the three pairings of ITM;
- ITM needs [CLS] alone, so the last block makes no other row; and what block one does before it meets the other
  modality is done once per row, not once per pair;
- the last block of the decoder, the pixel head, the last block before the LM head and the head itself see masked rows
  alone, and neither the predicted pixels nor all logits ever exist.

Shape legend: B batch, N patches, T packed tokens, M masked tokens, K masked patches, R = 3B pairs, C width, H heads, D
head width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvlm.model import attention_backends as backends
from mvlm.model.attention import Attention
from mvlm.model.cross_encoder import CrossEncoder
from mvlm.model.encoders import PackedText
from mvlm.model.fast_attention import Memory, attend_cross, attend_self, packing_of, take_rows, take_within
from mvlm.model.packing import Packing, rounded
from mvlm.model.patches import mask_tokens, masked_patches, visible_patches
from mvlm.model.plain import Streams
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import gather_patches, linear_pixel_loss, place_tokens

if TYPE_CHECKING:
    from mvlm.model.maskvlm import MaskVLM


def encode(model: "MaskVLM", batch: Batch, masks: Masks) -> Streams:
    """One pass of each encoder over whole and masked inputs."""
    v, vm = _encode_images(model, batch.images, masks.patch_ids)
    w, wm = _encode_texts(model, batch, masks)
    return Streams(v, vm, w, wm, (Memory(v), Memory(w.rows, packing_of(w))))


def encode_whole(model: "MaskVLM", batch: Batch) -> tuple[Tensor, PackedText]:
    """v (B, 1+N, C) and w of the whole pictures and captions alone."""
    image, text = model.image_encoder, model.text_encoder
    whole = place_tokens(_patch_tokens(model, batch.images), image.mask_token, image.position, image.cls_token)
    longest = rounded(batch.max_length)
    packing = Packing(batch.cu_seqlens, longest, len(batch.tokens))
    x = text.run(batch.tokens, _places(packing, model), attend_self(packing))  # (T, C)
    return image.run(whole, attend_self(None)), PackedText(x, batch.cu_seqlens, longest)


def _patch_tokens(model: "MaskVLM", images: Tensor) -> Tensor:
    """The projected patches (B, N, C) of images uint8 (B, 3, H, W)."""
    encoder = model.image_encoder
    patches = gather_patches(
        images,
        None,
        model.config.patch_size,
        mean=encoder.mean.flatten(),
        std=encoder.std.flatten(),
        dtype=backends.compute_dtype(encoder.patch_projection.weight),
    )  # (B, N, 3*P*P)
    return encoder.patch_projection(patches)


def _places(packing: Packing, model: "MaskVLM") -> Tensor:
    """int64 (T,), the place of each row in its caption; of a row of none, any."""
    return (packing.place % packing.max_length).clamp(max=model.config.text_length - 1)


def _encode_images(model: "MaskVLM", images: Tensor, patch_ids: Tensor) -> tuple[Tensor, Tensor]:
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
    x = encoder.run(take_within(whole, seen), attend_self(None))  # (B, 1+N-K, C)
    placed = place_tokens(x[:, 1:], *parameters, visible_ids=visible)
    vm = torch.cat([x[:, :1] + encoder.position[0], placed[:, 1:]], dim=1)
    return encoder.run(whole, attend_self(None)), vm


def _encode_texts(model: "MaskVLM", batch: Batch, masks: Masks) -> tuple[PackedText, PackedText]:
    """w and wm, (T, C) each."""
    encoder, total = model.text_encoder, len(batch.tokens)
    longest = rounded(batch.max_length)
    hidden = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)
    # The masked captions follow the last whole one at once: rows that belong to no caption (there are some where totals
    # are rounded up) must all come last.
    end = batch.cu_seqlens[-1:].long()
    rows = torch.arange(2 * total, device=end.device)
    tokens = torch.where(rows < end, torch.cat([batch.tokens, hidden]), hidden[(rows - end).clamp(0, total - 1)])
    packing = Packing(torch.cat([batch.cu_seqlens[:-1], batch.cu_seqlens + batch.cu_seqlens[-1]]), longest, 2 * total)
    x = encoder.run(tokens, _places(packing, model), attend_self(packing))  # (2T, C)
    masked = x.index_select(0, (end + rows[:total]).clamp(max=2 * total - 1))
    return PackedText(x[:total], batch.cu_seqlens, longest), PackedText(masked, batch.cu_seqlens, longest)


def reconstruction_losses(
    model: "MaskVLM", streams: Streams, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor, Tensor]:
    """MLM, the mean over the batch's M masked tokens; MIM, the mean over its B x K masked patches; MLM's accuracy."""
    image, text = _memories(streams.image, streams.text, streams.memories)
    mlm, accuracy = _masked_language(model, streams, image, batch, masks)
    return mlm, _masked_image(model, streams, text, batch, masks), accuracy


def _masked_language(
    model: "MaskVLM", streams: Streams, image: Memory, batch: Batch, masks: Masks
) -> tuple[Tensor, Tensor]:
    packing, x = packing_of(streams.masked_text), streams.masked_text.rows
    # Of those that the rounding up has added, no token exists: they lie behind the last caption.
    bounds = torch.searchsorted(masks.token_ids, batch.cu_seqlens.long()).int()  # (B+1,)
    chosen = Packing(bounds, packing.max_length, len(masks.token_ids))

    def take(rows: Tensor) -> Tensor:
        return rows.index_select(0, masks.token_ids)  # (T, C) -> (M, C)

    *early, last = model.text_cross.layers
    for block in early:
        x = block(x, attend_self(packing), attend_cross(block, packing, image))
    x = model.text_cross.norm(
        last(x, attend_self(packing, take, chosen), attend_cross(last, chosen, image), take)
    )  # (M, C)
    targets = batch.tokens.index_select(0, masks.token_ids)
    targets = targets.masked_fill(masks.token_ids >= batch.cu_seqlens[-1], -100)
    head = model.language_head
    return linear_cross_entropy(head.transform(x), head.vocabulary.weight, head.vocabulary.bias, targets)


def _masked_image(model: "MaskVLM", streams: Streams, text: Memory, batch: Batch, masks: Masks) -> Tensor:
    x = streams.masked_image

    def take(rows: Tensor) -> Tensor:
        return take_within(rows, 1 + masks.patch_ids)  # (B, 1+N, C) -> (B, K, C)

    for block in model.image_cross.layers:
        x = block(x, attend_self(None), attend_cross(block, None, text))
    x = model.image_cross.norm(x)
    *early, last = model.image_decoder.layers
    for block in early:
        x = block(x, attend_self(None), attend_cross(block, None, text))
    x = last(x, attend_self(None, take), attend_cross(last, None, text), take)
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
    model: "MaskVLM",
    v: Tensor,
    text: PackedText,
    images: Tensor,
    texts: Tensor,
    memories: tuple[Memory, Memory] | None = None,
) -> Tensor:
    """ITM logits (R, 2) of R pairs: rows images int64 (R,) of v (B, 1+N, C) with captions texts int64 (R,) of text.

    `memories`, if given, are those of v and text.
    """
    image_memory, text_memory = _memories(v, text, memories)
    packing = packing_of(text)
    # Only the device knows how many rows the drawn captions have together; on a CPU asking costs nothing.
    capacity = len(texts) * packing.max_length
    if texts.device.type == "cpu" and not torch.compiler.is_compiling():
        capacity = int((text.cu_seqlens[1:] - text.cu_seqlens[:-1]).index_select(0, texts).sum())
    chosen, rows = packing.select(texts, capacity)
    image = _first_rows(model.image_cross, v, None, text_memory, texts, images, None)
    word = _first_rows(model.text_cross, text.rows, packing, image_memory, images, rows, chosen)
    return model.matching_head(image * word)


def _first_rows(
    encoder: CrossEncoder,
    x: Tensor,
    packing: Packing | None,
    memory: Memory,
    key_index: Tensor,
    drawn: Tensor,
    chosen: Packing | None,
) -> Tensor:
    """[CLS] (R, C) of R sequences drawn from x, each reading sequence key_index[r] of memory.

    x is (B, L, C) dense, then drawn int64 (R,) are its sequences; or packed (T, C) with `packing`, then drawn are its
    rows that the R sequences take, which lie as `chosen` says.
    """

    def draw(rows: Tensor) -> Tensor:
        return take_rows(rows, drawn)

    def first(rows: Tensor) -> Tensor:
        return rows.index_select(0, chosen.cu_seqlens[:-1]) if chosen else rows[:, 0]  # (R, C)

    def own_first(attention: Attention, y: Tensor) -> Tensor:
        return attention.first_rows(first(y), chosen.pad(y) if chosen else y, chosen.exists if chosen else None)

    *early, last = encoder.layers
    if not early:
        x = draw(x)
    for number, block in enumerate(early):
        # Up to the first block's second third nothing has been read from the other modality: that much is done once
        # per row of x, not once per pair.
        own, between = (attend_self(packing), draw) if number == 0 else (attend_self(chosen), None)
        x = block(x, own, attend_cross(block, chosen, memory, key_index), between=between)

    read = attend_cross(last, None, memory, key_index)  # outside the block, whose call may be run again for backward

    def other(attention: Attention, y: Tensor) -> Tensor:
        return read(attention, y.unsqueeze(1)).squeeze(1)

    return encoder.norm(last(x, own_first, other, take=first))


def _memories(v: Tensor, text: PackedText, memories: tuple[Memory, Memory] | None) -> tuple[Memory, Memory]:
    return memories or (Memory(v), Memory(text.rows, packing_of(text)))
