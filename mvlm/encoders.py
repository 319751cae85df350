"""The two encoders: a ViT for images (pre-norm, as in timm) and a RoBERTa for text (post-norm, as in transformers).

Both agree with those libraries when their weights are copied over; tests/mvlm/test_encoders.py holds it.
Shape legend: B batch, N patches, T packed tokens, L tokens of the longest caption, C width, P patch side, S image side.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvlm.attention import Attention, FeedForward, run_block, spread
from mvlm.config import MaskVLMConfig


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, S, S) into rows (B, N, 3*P*P); features in (c, y, x) order, patches in row-major order."""
    rows = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, S/P, P, S/P, P)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, N, 3*P*P) -> (B, 3, S, S)."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (3, patch_size, patch_size)).unflatten(1, (side, side))  # (B, S/P, S/P, 3, P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class ImageBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1+N, C) -> (B, 1+N, C)."""
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """ViT over all patches. Masked patches go through it as a learned mask token (SimMIM), none is dropped."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.checkpoint = False
        """Whether backward runs each block again instead of keeping what is inside it."""
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)
        self.patch_projection = nn.Linear(config.patch_values, config.width)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, config.width))
        self.blocks = nn.ModuleList(ImageBlock(config.width, config.heads) for _ in range(config.image_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> (x/255 - mean) / std in the parameters' dtype; floats are taken as 0..1."""
        scale = 255 if images.dtype == torch.uint8 else 1
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images.to(mean.dtype) / scale - mean) / std

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images uint8 or float 0..1 (B, 3, S, S); masked bool (B, N), True = replaced by the mask token.

        Returns features (B, 1+N, C), [CLS] first.
        """
        x = self.patch_projection(patchify(self.normalize(images), self.patch_size))  # (B, N, C)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls = self.cls_token.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.position  # (B, 1+N, C)
        for block in self.blocks:
            x = run_block(block, x, again=self.checkpoint)
        return self.norm(x)


class TextBlock(nn.Module):
    """Post-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, rows: Tensor, key_mask: Tensor) -> Tensor:
        """x (T, C) packed, rows int64 (T,) its places in (B, L), key_mask bool (B, L), True = a token -> (T, C)."""
        x = self.norm1(x + self.attention.packed(x, rows, key_mask))
        return self.norm2(x + self.mlp(x))


class TextEncoder(nn.Module):
    """RoBERTa without token types: its single type embedding is a constant that the positions absorb."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.checkpoint = False
        """As in the image encoder."""
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_layers))

    def forward(self, tokens: Tensor, rows: Tensor, key_mask: Tensor) -> Tensor:
        """Packed tokens int64 (T,) -> features (T, C).

        rows int64 (T,) are the tokens' places in (B, L), flattened; key_mask bool (B, L), True = a token.
        """
        place = rows % key_mask.shape[1]  # (T,) within its caption
        x = self.norm(self.words(tokens) + self.position.index_select(0, place))  # (T, C)
        for block in self.blocks:
            x = run_block(block, x, rows, key_mask, again=self.checkpoint)
        return x


class PackedText(NamedTuple):
    """Features of captions that follow one another with no padding between."""

    rows: Tensor
    """(T, C); rows from cu_seqlens[-1] on belong to no caption and may hold anything."""
    cu_seqlens: Tensor
    """int (B+1,), caption b is rows[cu_seqlens[b]:cu_seqlens[b+1]]."""
    max_length: int
    """At least the tokens of the longest caption; a host number."""

    def first(self) -> Tensor:
        """[CLS] of each caption: (B, 1, C)."""
        return self.rows.index_select(0, self.cu_seqlens[:-1]).unsqueeze(1)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Features (B, L, C), zero where there is padding, and the key mask bool (B, L), True = a token."""
        rows, key_mask = padded_places(len(self.rows), self.cu_seqlens, self.max_length)
        return spread(self.rows, rows, key_mask), key_mask


def padded_places(number: int, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Where packed tokens lie once padded: rows int64 (T,), places in (B, L) flattened, and the key mask bool (B, L).

    T = number and L = max_length come from the host, so that nothing on the device is counted; True = a token.
    """
    starts = cu_seqlens.long()
    packed = torch.arange(number, device=starts.device)
    caption = torch.searchsorted(starts[1:], packed, right=True)  # captions that end at or before a position
    rows = caption * max_length + packed - starts[caption]
    lengths = starts[1:] - starts[:-1]
    return rows, torch.arange(max_length, device=starts.device) < lengths[:, None]
