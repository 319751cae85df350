"""Cross-modality encoders: self-attention of one stream, cross-attention to the other encoder's output.

Shape legend: B batch, L rows of this stream, M rows of the other, N patches, T packed rows, C width, H heads, D head
width.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from mvlm.device import compute_dtype
from mvlm.model.attention import Attend, Attention, FeedForward
from mvlm.model.packing import Packing
from mvlm.model.residual import Branch, Residual, add_norm

SelectRows = Callable[[Tensor], Tensor]
"""Selection of some rows of a stream: (..., L, C) -> (..., fewer or repeated rows, C)."""


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to the other encoder's output, and feed-forward, each with a residual sum.

    `norm="post"` normalises after each sum, as in the paper; `norm="pre"` normalises before each sub-layer.
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
        rows: Residual,
        attend_self: Attend,
        attend_cross: Attend,
        select: SelectRows | None = None,
        select_between: SelectRows | None = None,
    ) -> Residual:
        """Rows (B, L, C), or packed (T, C) -> the same shape, or fewer rows.

        Args:
            attend_self: self-attention; called with this block's module and x, or the norm of x.
            attend_cross: cross-attention; called with this block's module and the rows after self-attention.
            select: for an `attend_self` that returns some rows only: selects the same rows of x.
            select_between: selects rows after self-attention, for `attend_cross` and all that follows.
        """
        post = not self.pre
        x, y = rows
        if self.pre:
            x, y = add_norm(self.norm1, x, None if y is None else Branch(y))
        branch = attend_self(self.self_attention, x if y is None else y)
        x = x if select is None else select(x)
        x, y = add_norm(self.norm2 if self.pre else self.norm1, x, branch, post_norm=post)
        if select_between is not None:
            same, x = x is y, select_between(x)
            y = x if same else select_between(y)
        branch = attend_cross(self.cross_attention, y)
        x, y = add_norm(self.norm3 if self.pre else self.norm2, x, branch, post_norm=post)
        if self.pre:
            return Residual(x, self.mlp(y))
        return Residual(*add_norm(self.norm3, x, self.mlp.branch(y), post_norm=True))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, D) of the cross-attention, from rows (..., C) of the other stream."""
        return self.cross_attention.keys_values(memory)


class CrossEncoder(nn.Module):
    """A stack of cross-modality blocks. With pre-norm, a last LayerNorm follows."""

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
        """x (B, L, C) attends to itself and to memory (B, M, C); masks bool (B, L) and (B, M), True = the row exists.

        Returns (B, L, C). With `first_row_only` it returns the first row (B, 1, C), and the last block computes no
        other.
        """

        def attend_self(attention: Attention, y: Tensor) -> Branch:
            return attention(y, y, key_mask)

        def attend_self_first(attention: Attention, y: Tensor) -> Branch:
            return attention(first_row(y), y, key_mask)

        def attend_cross(attention: Attention, y: Tensor) -> Branch:
            return attention(y, memory, memory_mask)

        *early, last = self.layers
        rows = Residual(x)
        for block in early:
            rows = block(rows, attend_self, attend_cross)
        if first_row_only:
            return self.finish(last(rows, attend_self_first, attend_cross, select=first_row))
        return self.finish(last(rows, attend_self, attend_cross))

    def finish(self, rows: Residual) -> Tensor:
        """Features (..., C) from the output of the last block; with pre-norm, its last sum and the norm after it."""
        if not isinstance(self.norm, nn.LayerNorm):
            return rows.x
        return add_norm(self.norm, rows.x, None if rows.y is None else Branch(rows.y), out_dtype=rows.x.dtype)[1]

    @property
    def layers(self) -> list[CrossBlock]:
        """The blocks, with their type."""
        return [block for block in self.blocks if isinstance(block, CrossBlock)]


def first_row(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, 1, C)."""
    return x[:, :1]


class KeyValueCache:
    """Key/value cache for cross-attention: keys and values of one encoder's output, computed once for each layer.

    Args:
        rows: features (B, 1+N, C), or packed (T, C).
        packing: layout of packed rows; None for rows that are not packed.
    """

    def __init__(self, rows: Tensor, packing: Packing | None = None) -> None:
        self.rows = rows.to(compute_dtype(rows))
        self.packing = packing
        self._cached: dict[CrossBlock, tuple[Tensor, Tensor]] = {}

    def keys_values(self, block: CrossBlock) -> tuple[Tensor, Tensor]:
        """Keys and values for a block: (B, 1+N, H, D) or (T, H, D) each."""
        if block not in self._cached:
            self._cached[block] = block.keys_values(self.rows)
        return self._cached[block]
