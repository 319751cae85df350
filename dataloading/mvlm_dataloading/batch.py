"""Batches of image-text pairs and their masks, as the loader yields them and the model takes them.

Shape legend: B batch, S image side, T packed tokens of the batch, K masked patches per image, M masked tokens of the
batch.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


class _ToDevice:
    def to(self, device: torch.device | str, non_blocking: bool = False):
        """A copy with every tensor on `device`. Python numbers stay as they are."""
        moved = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return type(self)(**moved)


@dataclass(frozen=True, slots=True)
class Batch(_ToDevice):
    """Image-text pairs with packed text: the captions' tokens are concatenated, without padding."""

    images: Tensor
    """uint8 (B, 3, S, S), RGB."""
    tokens: Tensor
    """int64 (T,), every caption as [CLS] ... [SEP]."""
    cu_seqlens: Tensor
    """int32 (B+1,): caption b is tokens[cu_seqlens[b]:cu_seqlens[b+1]]."""
    max_length: int
    """Tokens of the longest caption, as a Python number, so that no device value has to be read."""
    image_id: Tensor
    """int64 (B,), equal for rows of the same image."""
    text_id: Tensor
    """int64 (B,), equal for rows with equal captions."""
    sample_id: Tensor
    """int64 (B,), the sample's position in the split. With seed and epoch, it determines all random draws."""
    image_of: Tensor | None = None
    """int64 (B,), the row in `images` of each sample's image, in a batch that has each image and each caption once
    (`Loader`, `per_image`). `images` then has I rows and `cu_seqlens` U captions, I and U at most B. None: row b is of
    sample b."""
    caption_of: Tensor | None = None
    """int64 (B,), the caption of each sample, as its number in `cu_seqlens`; None as for `image_of`."""
    sample_tokens: int = 0
    """Number of tokens of the B samples' captions, where a shared caption counts once for each sample. Used with
    `caption_of`."""
    epoch: Tensor | None = None
    """int64 (B,), the epoch of each sample, in a batch of a loader."""

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Image and caption of each sample, int64 (B,) each: rows of `images`, and captions of `cu_seqlens`."""
        rows = torch.arange(len(self.sample_id), device=self.images.device)
        return rows if self.image_of is None else self.image_of, rows if self.caption_of is None else self.caption_of


@dataclass(frozen=True, slots=True)
class Masks(_ToDevice):
    """Masked positions, whose content is replaced and has to be predicted.

    In a batch that has each image and each caption once (`Batch.image_of`), they are those of its I images and U
    captions.
    """

    patch_ids: Tensor
    """int64 (B, K), masked patches of each image in row-major order, ascending."""
    token_ids: Tensor
    """int64 (M,), masked positions in `Batch.tokens`, ascending; never a special token."""
