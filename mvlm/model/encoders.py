"""The two encoders: a ViT for images (pre-norm, as in timm) and a RoBERTa for text (post-norm, as in transformers).

Both agree with those libraries when their weights are copied over; tests/mvlm/model/test_encoders.py holds it.
Shape legend: B batch, N patches, T packed tokens, L tokens of the longest caption, C width, P patch side, S image side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.model.attention import Attend, Attention, FeedForward, spread


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

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, 1+N, C) -> (B, 1+N, C); `attend` computes the self-attention."""
        x = x + attend(self.attention, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """ViT over all patches. Masked patches go through it as a learned mask token (SimMIM), none is dropped."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.mean: Tensor
        self.std: Tensor
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
        return (images.to(self.mean.dtype) / scale - self.mean) / self.std

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images uint8 or float 0..1 (B, 3, S, S); masked bool (B, N), True = replaced by the mask token.

        Returns features (B, 1+N, C), [CLS] first.
        """
        return self.run(self.embed(images, masked), lambda attention, y: attention(y, y))

    def embed(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """What the blocks are given: (B, 1+N, C)."""
        x = self.patch_projection(patchify(self.normalize(images), self.patch_size))  # (B, N, C)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls = self.cls_token.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([cls, x], dim=1) + self.position

    def forward_visible(self, images: Tensor, visible_ids: Tensor) -> Tensor:
        """Only the patches visible_ids int64 (B, K) go through the blocks (MAE, He et al. 2022).

        Behind them each comes to its place, mask tokens take the others, and positions are added again to all, as at
        MAE's decoder. Returns (B, 1+N, C), [CLS] first.
        """
        x = self.embed(images)
        index = torch.cat([torch.zeros_like(visible_ids[:, :1]), 1 + visible_ids], dim=1).unsqueeze(-1)  # (B, 1+K, 1)
        x = self.run(x.gather(1, index.expand(-1, -1, x.shape[-1])), lambda attention, y: attention(y, y))
        hidden = self.mask_token.to(x.dtype).expand(len(x), len(self.position), -1)
        return hidden.scatter(1, index.expand(-1, -1, x.shape[-1]), x) + self.position

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """The blocks over embedded rows (B, L, C), and the last norm -> (B, L, C)."""
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x)


class TextBlock(nn.Module):
    """Post-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Packed (T, C) -> (T, C); `attend` computes the self-attention."""
        x = self.norm1(x + attend(self.attention, x))
        return self.norm2(x + self.mlp(x))


class TextEncoder(nn.Module):
    """RoBERTa without token types: its single type embedding is a constant that the positions absorb."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_layers))

    def forward(self, tokens: Tensor, rows: Tensor, key_mask: Tensor) -> Tensor:
        """Packed tokens int64 (T,) -> features (T, C).

        rows int64 (T,) are the tokens' places in (B, L), flattened; key_mask bool (B, L), True = a token.
        """
        place = rows % key_mask.shape[1]  # (T,) within its caption
        return self.run(tokens, place, lambda attention, x: attention.packed(x, rows, key_mask))

    def run(self, tokens: Tensor, place: Tensor, attend: Attend) -> Tensor:
        """Packed tokens int64 (T,) at the places int64 (T,) of their captions -> (T, C)."""
        # A look-up as of words: unlike that of index_select, its backward adds up in a fixed order on a GPU too.
        x = self.norm(self.words(tokens) + F.embedding(place, self.position))  # (T, C)
        for block in self.blocks:
            x = block(x, attend)
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
