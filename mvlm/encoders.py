"""The two encoders: a ViT for images (pre-norm, as in timm) and a RoBERTa for text (post-norm, as in transformers).

Both agree with those libraries when their weights are copied over; tests/mvlm/test_encoders.py holds it.
Shape legend: B batch, N patches, L tokens, C width, P patch side, S image side.
"""

import torch
from torch import Tensor, nn

from mvlm.attention import Attention, FeedForward
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
            x = block(x)
        return self.norm(x)


class TextBlock(nn.Module):
    """Post-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x (B, L, C), key_mask bool (B, L), True = a token -> (B, L, C)."""
        x = self.norm1(x + self.attention(x, x, key_mask))
        return self.norm2(x + self.mlp(x))


class TextEncoder(nn.Module):
    """RoBERTa without token types: its single type embedding is a constant that the positions absorb."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_layers))

    def forward(self, tokens: Tensor, key_mask: Tensor) -> Tensor:
        """tokens int64 (B, L) padded at the end, key_mask bool (B, L), True = a token. Returns (B, L, C).

        Rows of padding are computed but mean nothing.
        """
        x = self.norm(self.words(tokens) + self.position[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, key_mask)
        return x


def pad_packed(tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Packed tokens (T,) -> padded tokens (B, L) with L = max_length, and the key mask bool (B, L), True = a token.

    Nothing is counted on the device: `max_length` comes from the host. Padding repeats some real token, which the
    key mask hides.
    """
    column = torch.arange(max_length, device=tokens.device)
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    index = start + column  # (B, L)
    return tokens[index.clamp(max=len(tokens) - 1)], index < end
