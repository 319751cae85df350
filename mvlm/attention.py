"""Multi-head attention, and the one rule for which implementation computes it.

Shape legend: B batch, Lq queries, Lk keys, C width, H heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q (B, H, Lq, D), k and v (B, H, Lk, D); key_mask bool (B, Lk), True = the key exists. Returns (B, H, Lq, D).
    On a CPU in bf16 two batched matrix products are about four times as fast as SDPA, forward and backward together
    (its bf16 backward runs in scalar code); everywhere else SDPA is used.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, Lk)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, Lq, Lk)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def spread(x: Tensor, rows: Tensor, key_mask: Tensor) -> Tensor:
    """Packed x (T, C) -> (B, L, C) with zeros for padding; rows int64 (T,) are places in (B, L), flattened.

    A place from B*L on is none: one more row takes what belongs to no caption.
    """
    places = x.new_zeros(key_mask.numel() + 1, x.shape[-1]).index_copy(0, rows.clamp(max=key_mask.numel()), x)
    return places[:-1].view(*key_mask.shape, -1)


class Attention(nn.Module):
    """Attention with projections: queries from one stream, keys and values from the same or from another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B, Lq, C) attends to memory (B, Lk, C); key_mask bool (B, Lk), True = exists. Returns (B, Lq, C)."""
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return self.out(self._attend(q, k, v, key_mask))

    def packed(self, x: Tensor, rows: Tensor, key_mask: Tensor) -> Tensor:
        """Self-attention of packed sequences: x (T, C), whose rows int64 (T,) say where each lies in (B, L), flattened.

        key_mask bool (B, L), True = exists. Returns (T, C). Only the attention itself sees padding.
        """
        q, k, v = (spread(projection(x), rows, key_mask) for projection in (self.query, self.key, self.value))
        return self.out(self._attend(q, k, v, key_mask).flatten(0, 1).index_select(0, rows))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Projected q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C)."""
        heads = attend(self._split(q), self._split(k), self._split(v), key_mask)  # (B, H, Lq, D)
        return heads.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, H, L, D)


def run_block(block: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """block(*inputs). With `again`, nothing inside it is kept for backward, which runs it once more instead."""
    return checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)  # pyright: ignore[reportReturnType]


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down(F.gelu(self.up(x)))
