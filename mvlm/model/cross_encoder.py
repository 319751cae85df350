"""Cross-modality encoders: one stream reads the other encoder's output.

Shape legend: B batch, L rows of the own stream, M rows of the other, C width.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from mvlm.model.attention import Attend, Attention, FeedForward

Rows = Callable[[Tensor], Tensor]
"""Chooses rows of a stream."""


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
        self, x: Tensor, own: Attend, other: Attend, take: Rows | None = None, between: Rows | None = None
    ) -> Tensor:
        """x (B, L, C), or packed (T, C) -> the same, or fewer rows.

        `own(attention, y)` is self-attention over y, what x is or its norm; `other(attention, y)` reads the other
        stream. Where `own` answers for some rows alone, `take` takes them of x. `between` may draw rows before `other`.
        """
        y = self.norm1(x) if self.pre else x
        x = (x if take is None else take(x)) + own(self.self_attention, y)
        x = x if self.pre else self.norm1(x)
        x = x if between is None else between(x)
        x = x + other(self.cross_attention, self.norm2(x) if self.pre else x)
        x = x if self.pre else self.norm2(x)
        x = x + self.mlp(self.norm3(x) if self.pre else x)
        return x if self.pre else self.norm3(x)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What the cross-attention reads of the other stream, (..., C): keys and values (..., H, D)."""
        return self.cross_attention.keys_values(memory)


class CrossEncoder(nn.Module):
    """A stack of cross-modality blocks; with pre-norm, one more LayerNorm closes it."""

    def __init__(self, width: int, heads: int, layers: int, norm: Literal["post", "pre"]) -> None:
        super().__init__()
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

        def own(attention: Attention, y: Tensor) -> Tensor:
            return attention(y, y, key_mask)

        def own_first(attention: Attention, y: Tensor) -> Tensor:
            return attention(y[:, :1], y, key_mask)

        def other(attention: Attention, y: Tensor) -> Tensor:
            return attention(y, memory, memory_mask)

        *early, last = self.layers
        for block in early:
            x = block(x, own, other)
        return self.norm(last(x, own_first, other, take=first_rows) if first_row_only else last(x, own, other))

    @property
    def layers(self) -> list[CrossBlock]:
        return [block for block in self.blocks if isinstance(block, CrossBlock)]


def first_rows(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, 1, C)."""
    return x[:, :1]
