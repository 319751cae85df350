"""Cross-modality encoders: self-attention of one stream, cross-attention to the other encoder's output.

Shape legend: B batch, L rows of the own stream, M rows of the other, C width.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from mvlm.device import compute_dtype
from mvlm.model.attention import Attend, Attention, FeedForward
from mvlm.model.packing import Packing

Rows = Callable[[Tensor], Tensor]
"""Selection of rows of a stream."""


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
        self, x: Tensor, own: Attend, other: Attend, select: Rows | None = None, between: Rows | None = None
    ) -> Tensor:
        """x (B, L, C), or packed (T, C) -> the same, or fewer rows.

        `own(attention, y)` is self-attention over y, which is x or its norm. `other(attention, y)` is cross-attention.
        Where `own` returns some rows alone, `select` selects the same rows of x. `between` may select rows before
        `other`.
        """
        y = self.norm1(x) if self.pre else x
        x = (x if select is None else select(x)) + own(self.self_attention, y)
        x = x if self.pre else self.norm1(x)
        x = x if between is None else between(x)
        x = x + other(self.cross_attention, self.norm2(x) if self.pre else x)
        x = x if self.pre else self.norm2(x)
        x = x + self.mlp(self.norm3(x) if self.pre else x)
        return x if self.pre else self.norm3(x)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, D) of the cross-attention, from the other stream's rows (..., C)."""
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
        return self.norm(last(x, own_first, other, select=first_rows) if first_row_only else last(x, own, other))

    @property
    def layers(self) -> list[CrossBlock]:
        return [block for block in self.blocks if isinstance(block, CrossBlock)]


def first_rows(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, 1, C)."""
    return x[:, :1]


class KeyValueCache:
    """Key/value cache for cross-attention: keys and values of one encoder's output, made once for each layer.

    Args:
        rows: (B, 1+N, C) padded, or (T, C) packed.
        packing: layout of packed rows; None for padded ones.
    """

    def __init__(self, rows: Tensor, packing: Packing | None = None) -> None:
        self.rows = rows.to(compute_dtype(rows))
        self.packing = packing
        self._made: dict[CrossBlock, tuple[Tensor, Tensor]] = {}

    def keys_values(self, block: CrossBlock) -> tuple[Tensor, Tensor]:
        """(B, 1+N, H, D) or (T, H, D) each."""
        if block not in self._made:
            self._made[block] = block.keys_values(self.rows)
        return self._made[block]
