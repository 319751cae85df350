"""Cross-modality encoders: one stream reads the other encoder's output.

Shape legend: B batch, L rows of the own stream, M rows of the other, C width.
"""

from typing import Literal

from torch import Tensor, nn

from mvlm.attention import Attention, FeedForward, run_block


class CrossBlock(nn.Module):
    """Self-attention, cross-attention (keys and values from the other encoder), feed-forward; residual around each.

    `norm="post"` normalises after each sum, as in the paper; `"pre"` before each sub-layer.
    """

    def __init__(self, width: int, heads: int, norm: Literal["post", "pre"]) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.self_attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.cross_attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        key_mask: Tensor | None,
        memory_mask: Tensor | None,
        first_row_only: bool = False,
    ) -> Tensor:
        """x (B, L, C), memory (B, M, C); masks bool (B, L) and (B, M), True = exists.

        Returns (B, L, C), or with `first_row_only` its first row (B, 1, C) at the price of one row: the other rows
        then serve as keys and values alone.
        """
        rows = slice(0, 1) if first_row_only else slice(None)
        if self.pre:
            y = self.norm1(x)
            x = x[:, rows] + self.self_attention(y[:, rows], y, key_mask)
            x = x + self.cross_attention(self.norm2(x), memory, memory_mask)
            return x + self.mlp(self.norm3(x))
        x = self.norm1(x[:, rows] + self.self_attention(x[:, rows], x, key_mask))
        x = self.norm2(x + self.cross_attention(x, memory, memory_mask))
        return self.norm3(x + self.mlp(x))


class CrossEncoder(nn.Module):
    """A stack of cross-modality blocks; with pre-norm, one more LayerNorm closes it."""

    def __init__(self, width: int, heads: int, layers: int, norm: Literal["post", "pre"]) -> None:
        super().__init__()
        self.checkpoint = False
        """Whether backward runs each block again instead of keeping what is inside it."""
        self.blocks = nn.ModuleList(CrossBlock(width, heads, norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm == "pre" else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        first_row_only: bool = False,
    ) -> Tensor:
        """x (B, L, C) reads memory (B, M, C); masks bool (B, L) and (B, M), True = exists.

        Returns (B, L, C), or with `first_row_only` the first row (B, 1, C), for which the last block computes no other.
        """
        again = self.checkpoint
        for block in self.blocks[:-1]:
            x = run_block(block, x, memory, key_mask, memory_mask, again=again)
        return self.norm(run_block(self.blocks[-1], x, memory, key_mask, memory_mask, first_row_only, again=again))
