"""Attention for the fast implementation: padded or packed sequences, a subset of query rows, cached keys and values.

`attend_self` and `attend_cross` make the functions that a block calls for its attention.

Shape legend: B sequences, L rows of the longest sequence, T packed rows, C width, K selected rows, R query sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import compute_dtype
from mvlm.model import attention_backends as backends
from mvlm.model.attention import Attend, Attention, TextPooling
from mvlm.model.cross_encoder import CrossBlock, CrossEncoder, KeyValueCache, SelectRows
from mvlm.model.packing import Packing
from mvlm.model.residual import Branch, Residual

MAX_QUERIES = 128
"""Largest number of captions in one sequence of queries."""


class Selection(NamedTuple):
    """Some rows of a stream, in any order and with repetitions."""

    select: SelectRows
    packing: Packing | None = None
    """Layout of the rows that it selects, if they are packed."""


def attend_self(packing: Packing | None, read: Selection | None = None) -> Attend:
    """Make the self-attention of rows (B, L, C), or packed (T, C) with `packing`. With `read`, only its rows query."""

    def attend(attention: Attention, y: Tensor) -> Branch:
        # Cast once, before the projections: autocast would cast y for each of them and save every copy.
        y = y.to(compute_dtype(y))
        if read is None:
            q, k, v = attention.queries_keys_values(y)
        else:
            q, (k, v) = attention.queries(read.select(y)), attention.keys_values(y)
        if read is None and packing is None:
            heads = backends.image_attention(q, k, v, attention.image_backend)
        else:
            # Selected queries of images come here too: text_attention takes sides of different lengths.
            queries = packing if read is None else read.packing
            heads = backends.text_attention(q, k, v, queries, packing, None, attention.text_backend)
        return attention.project_out(heads)

    return attend


def attend_cross(
    block: CrossBlock, packing: Packing | None, cache: KeyValueCache, key_index: backends.KeyIndex | None = None
) -> Attend:
    """Make the cross-attention of rows (R, L, C), or packed (T, C) with `packing`, to the sequences of a cache.

    key_index: the partner of each sequence in the cache. None: sequence r attends to sequence r.
    """
    # Not inside `attend`: activation checkpointing calls that again in backward. It would find the cache filled, and
    # recompute fewer tensors than the forward pass saved.
    k, v = cache.keys_values(block)

    def attend(attention: Attention, y: Tensor) -> Branch:
        q = attention.queries(y)
        return attention.project_out(
            backends.text_attention(q, k, v, packing, cache.packing, key_index, attention.text_backend)
        )

    return attend


def conditioned_similarity(pooling: TextPooling, v: Tensor, texts: Tensor) -> Tensor:
    """Compute `TextPooling.similarity`: v (B, 1+N, C) and texts (G, E) -> (B, G).

    Captions are the queries, in sequences of at most 128: the short side of `mvlm_kernels.cross_attention`. Each
    sequence reads the keys of its image in place.
    """
    q, (k, values) = pooling.queries(texts), pooling.keys_values(v)  # (G, H, D), (B, 1+N, H, D)
    longest = min(len(q), MAX_QUERIES)
    sequences = -(-len(q) // longest)
    q = F.pad(q, (0, 0, 0, 0, 0, sequences * longest - len(q))).unflatten(0, (sequences, longest))
    rows = torch.arange(len(v) * sequences, device=v.device) // sequences
    heads = backends.text_attention(
        q.repeat(len(v), 1, 1, 1), k, values, None, None, backends.KeyIndex(rows, len(v)), pooling.text_backend
    )  # (B sequences, longest, H, D)
    pooled = heads.flatten(2).unflatten(0, (len(v), sequences)).flatten(1, 2)[:, : len(texts)]
    return pooling.cosine(pooled, texts)


def encode_rows(
    encoder: CrossEncoder,
    rows: Residual,
    packing: Packing | None,
    cache: KeyValueCache,
    key_index: backends.KeyIndex | None = None,
    repeat: Selection | None = None,
    read: Selection | None = None,
) -> Tensor:
    """Run a cross-modality encoder over all rows (B, L, C), or packed (T, C) with `packing`.

    Returns the same shape, or that of the rows repeated, or that of the rows read.

    Args:
        cache: rows of the other stream, whose keys and values are computed once a layer.
        key_index: the partner of each sequence in the cache. None: sequence r attends to sequence r.
        repeat: repeats sequences that have several partners, after the self-attention of the first block.
        read: the rows that the caller reads, of those repeated. The last block computes no other.
    """
    layers = encoder.layers
    if repeat and read and len(layers) == 1:
        rows = Residual(repeat.select(rows.x), None if rows.y is None else repeat.select(rows.y))
        packing, repeat = repeat.packing, None
    for block in layers:
        if read and block is layers[-1]:
            cross = attend_cross(block, read.packing, cache, key_index)
            return encoder.finish(block(rows, attend_self(packing, read), cross, select=read.select))
        after = repeat.packing if repeat else packing
        cross = attend_cross(block, after, cache, key_index)
        rows = block(rows, attend_self(packing), cross, select_between=repeat.select if repeat else None)
        packing, repeat = after, None
    return encoder.finish(rows)


def select_within(x: Tensor, positions: Tensor) -> Tensor:
    """Select rows positions int64 (B, K), all different, of each sequence of x (B, L, C) -> (B, K, C)."""
    # index_select over flattened rows is faster than `gather`, which needs an index for every feature.
    rows = positions + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, positions.shape)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], with a backward that adds up repeated rows in a fixed order."""
    # The backward of index_select is deterministic on a CPU and not on CUDA; that of indexing is the reverse.
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]
