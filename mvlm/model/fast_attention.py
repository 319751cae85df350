"""Attention as the fast plan has it: of dense or packed rows, for some rows alone, keys and values made once.

A block of the model calls functions of its attention and its normalised rows; `attend_self` and `attend_cross` make
them.

Shape legend: B sequences, N patches, L rows of the longest sequence, T packed rows, C width, H heads, D head width, K
rows taken, R query sequences.
"""

import torch
from torch import Tensor

from mvlm.model import attention_backends as backends
from mvlm.model.attention import Attend, Attention
from mvlm.model.cross_encoder import CrossBlock, Rows
from mvlm.model.encoders import PackedText
from mvlm.model.packing import Packing, rounded


class Memory:
    """The output of one encoder as cross-attention reads it: keys and values are made once for each layer.

    Args:
        rows: (B, 1+N, C) dense, or (T, C) packed.
        packing: where packed rows lie; None for dense ones.
    """

    def __init__(self, rows: Tensor, packing: Packing | None = None) -> None:
        self.rows = rows.to(backends.compute_dtype(rows))
        self.packing = packing
        self._made: dict[CrossBlock, tuple[Tensor, Tensor]] = {}

    def keys_values(self, block: CrossBlock) -> tuple[Tensor, Tensor]:
        """(B, 1+N, H, D) or (T, H, D) each."""
        if block not in self._made:
            self._made[block] = block.keys_values(self.rows)
        return self._made[block]


def attend_self(packing: Packing | None, take: Rows | None = None, taken: Packing | None = None) -> Attend:
    """Self-attention of dense (B, L, C) or packed (T, C) rows; with `take`, for the rows that it takes alone, which lie
    as `taken` says."""

    def attend(attention: Attention, y: Tensor) -> Tensor:
        y = y.to(backends.compute_dtype(y))
        if take is None:
            q, k, v = attention.queries_keys_values(y)
        else:
            q, (k, v) = attention.queries(take(y)), attention.keys_values(y)
        if take is None and packing is None:
            heads = backends.self_attention(q, k, v, attention.self_backend)
        else:
            queries = packing if take is None else taken
            heads = backends.text_attention(q, k, v, queries, packing, None, attention.cross_backend)
        return attention.joined(heads)

    return attend


def attend_cross(block: CrossBlock, packing: Packing | None, memory: Memory, key_index: Tensor | None = None) -> Attend:
    """Cross-attention of dense or packed rows; sequence r reads sequence key_index[r] of memory, or r."""
    k, v = memory.keys_values(block)

    def attend(attention: Attention, y: Tensor) -> Tensor:
        q = attention.queries(y)
        return attention.joined(
            backends.text_attention(q, k, v, packing, memory.packing, key_index, attention.cross_backend)
        )

    return attend


def take_within(x: Tensor, places: Tensor) -> Tensor:
    """Of each sequence of x (B, L, C) the rows places int64 (B, K), all different: (B, K, C). Faster than `gather`."""
    rows = places + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, places.shape)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], whose gradient adds up in a fixed order: by one means on a CPU, by another on a GPU."""
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]


def packing_of(text: PackedText) -> Packing:
    """Where the rows of a PackedText lie, its longest caption rounded up."""
    return Packing(text.cu_seqlens, rounded(text.max_length), len(text.rows))
