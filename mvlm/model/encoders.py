"""The two encoders: a ViT for images (pre-norm, as in timm) and a RoBERTa for text (post-norm, as in transformers).

Both compute the same as those libraries on the same weights (tests/mvlm/model/test_encoders.py).

Shape legend: B batch, N patches, K visible patches, L rows, T packed tokens, C width, P patch side, S image side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.model.attention import Attend, Attention, FeedForward
from mvlm.model.packing import Packing
from mvlm.model.patches import patchify, sine_positions
from mvlm.model.residual import Branch, Residual, add_norm


class ImageBlock(nn.Module):
    """Pre-norm block of self-attention and feed-forward, as in ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width)

    def forward(self, rows: Residual, attend: Attend) -> Residual:
        """(B, 1+N, C) -> (B, 1+N, C); `attend` computes the self-attention."""
        x, normalised = add_norm(self.norm1, rows.x, None if rows.y is None else Branch(rows.y))
        x, normalised = add_norm(self.norm2, x, attend(self.attention, normalised))
        return Residual(x, self.mlp(normalised))


class ImageEncoder(nn.Module):
    """ViT over all patches. A learned mask token stands for each masked patch, as in SimMIM."""

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
        self.output_positions: Tensor | None
        self.register_buffer("output_positions", None, persistent=False)
        if config.output_positions:
            side = config.image_size // config.patch_size
            # (1+N, C); [CLS] has no place
            self.output_positions = F.pad(sine_positions(side, config.width), (0, 0, 1, 0))

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), uint8 or float in 0..1 -> (x - mean) / std of x in 0..1, in the parameters' dtype."""
        scale = 255 if images.dtype == torch.uint8 else 1
        return (images.to(self.mean.dtype) / scale - self.mean) / self.std

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images uint8 or float in 0..1 (B, 3, S, S); masked bool (B, N), True = replaced by the mask token.

        Returns features (B, 1+N, C), [CLS] first.
        """
        x = self.run(self.embed(images, masked), lambda attention, y: attention(y, y))
        return self.add_output_positions(x)

    def embed(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Embed [CLS] and the patches, with positions: the input of the blocks (B, 1+N, C)."""
        x = self.patch_projection(patchify(self.normalize(images), self.patch_size))  # (B, N, C)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls = self.cls_token.to(x.dtype).expand(x.shape[0], 1, -1)  # len(x) would be a constant of an exported program
        return torch.cat([cls, x], dim=1) + self.position

    def forward_visible(self, images: Tensor, visible_ids: Tensor) -> Tensor:
        """Encode only the patches visible_ids int64 (B, K), as MAE does (He et al. 2022).

        After the blocks each visible patch returns to its position, mask tokens fill the others, and positions are
        added to all rows again, as for MAE's decoder. Returns (B, 1+N, C), [CLS] first.
        """
        x = self.embed(images)
        index = F.pad(1 + visible_ids, (1, 0)).unsqueeze(-1)  # (B, 1+K, 1), [CLS] too, also where no patch is visible
        x = self.run(x.gather(1, index.expand(-1, -1, x.shape[-1])), lambda attention, y: attention(y, y))
        hidden = self.mask_token.to(x.dtype).expand(len(x), len(self.position), -1)
        x = hidden.scatter(1, index.expand(-1, -1, x.shape[-1]), x) + self.position
        return self.add_output_positions(x)

    def add_output_positions(self, x: Tensor) -> Tensor:
        """Add sines of row and column to features x (B, 1+N, C), if the configuration says so."""
        return x if self.output_positions is None else x + self.output_positions.to(x.dtype)

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """Run the blocks and the last norm over embedded rows (B, L, C) -> (B, L, C)."""
        rows = Residual(x)
        for block in self.blocks:
            rows = block(rows, attend)
        return add_norm(self.norm, rows.x, None if rows.y is None else Branch(rows.y), out_dtype=x.dtype)[1]


class TextBlock(nn.Module):
    """Post-norm block of self-attention and feed-forward, as in RoBERTa."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, rows: Residual, attend: Attend) -> Residual:
        """Packed (T, C) -> (T, C); `attend` computes the self-attention."""
        normalised = rows.x if rows.y is None else rows.y
        x, normalised = add_norm(self.norm1, rows.x, attend(self.attention, normalised), post_norm=True)
        return Residual(*add_norm(self.norm2, x, self.mlp.branch(normalised), post_norm=True))


class TextEncoder(nn.Module):
    """RoBERTa encoder without token type embeddings.

    RoBERTa has only one type, so its embedding is a constant that the position embeddings can absorb.
    """

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_layers))

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Packed tokens int64 (T,) -> features (T, C)."""
        return self.run(tokens, packing.position, lambda attention, x: attention.packed(x, packing))

    def run(self, tokens: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """Embed tokens and run the blocks; `attend` computes self-attention.

        tokens and their positions int64 (T,) -> (T, C), or padded (B, L) -> (B, L, C).
        """
        rows = self.embed(tokens, position)
        for block in self.blocks:
            rows = block(rows, attend)
        return rows.x

    def embed(self, tokens: Tensor, position: Tensor) -> Residual:
        """Embed tokens with their positions, int64 (T,) or (B, L): the input of the blocks (T, C) or (B, L, C)."""
        # F.embedding, not index_select: its backward is deterministic on CUDA.
        embedded = F.embedding(position, self.position)
        return Residual(*add_norm(self.norm, self.words(tokens), Branch(embedded), post_norm=True))
