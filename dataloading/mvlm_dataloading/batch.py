"""What the loader hands to the model: one batch of image-text pairs, and the masks drawn for it.

Shape legend: B batch, S image side, T packed tokens of the batch, K masked patches an image,
M masked tokens of the batch.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


class _ToDevice:
    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The same object with every tensor on `device`; Python numbers and lists are kept."""
        moved = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return type(self)(**moved)


@dataclass(frozen=True, slots=True)
class Batch(_ToDevice):
    """Image-text pairs. Text is packed: the captions' tokens follow one another, with no padding."""

    images: Tensor
    """uint8 (B, 3, S, S), RGB."""
    tokens: Tensor
    """int64 (T,), every caption as [CLS] ... [SEP]."""
    cu_seqlens: Tensor
    """int32 (B+1,), caption b is tokens[cu_seqlens[b]:cu_seqlens[b+1]]."""
    max_length: int
    """Tokens of the longest caption: a host number, so that nothing on the device has to be counted."""
    image_id: Tensor
    """int64 (B,), equal for rows that show the same picture."""
    text_id: Tensor
    """int64 (B,), equal for rows with equal captions."""
    sample_id: Tensor
    """int64 (B,), the sample's position in the split: what its randomness is a function of."""


@dataclass(frozen=True, slots=True)
class Masks(_ToDevice):
    """What is hidden. Both tensors name masked positions (masked = replaced, must be predicted)."""

    patch_ids: Tensor
    """int64 (B, K), masked patches of each image in row-major order, ascending."""
    token_ids: Tensor
    """int64 (M,), masked positions in `Batch.tokens`, ascending; never a special token."""
