"""Peers of cross_attention that take padded sequences: torch's.

Each takes q, k and v as the op does, and returns the output in q's layout. Libraries without packed or indexed keys get
padded or copied keys. Padding and copying are timed; building masks and indices is not.

Shape legend: R query sequences, Lq and Lk the longest lengths, T packed rows, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvlm_benchmarks.unavailable import Missing
from mvlm_kernels.case import Inputs

Function = Callable[..., Tensor]


def math_backend() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


def efficient_backend() -> Any:
    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)


def flash_backend() -> Any:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def cudnn_backend() -> Any:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def require_cuda(inputs: Inputs) -> None:
    """Raise Missing for tensors on a CPU."""
    if not inputs.leaves["q"].is_cuda:
        raise Missing("needs a CUDA device")


class Side:
    """The query or the key sequences of a case, and conversions between their layouts.

    Attributes:
        lengths: int64 (R,), of the sequence that each query sequence reads.
        longest: the longest length.
        ragged: lengths differ, or may.
        mask: bool (R, longest), True = a token; None unless ragged.
        cu_seqlens: int32 (R + 1,), where each sequence starts in the packed layout.
    """

    def __init__(self, inputs: Inputs, name: str) -> None:
        x, cu = inputs.leaves[name], inputs.fixed.get(f"cu_seqlens_{name}")
        index = inputs.fixed.get("key_index") if name == "k" else None
        padded_lengths = inputs.fixed.get("key_lengths") if name == "k" else None
        device = x.device
        if cu is not None:
            lengths, starts = cu.diff().long(), cu[:-1].long()
            self.longest = inputs.fixed[f"max_len_{name}"]
        else:
            count, self.longest = x.shape[:2]
            starts = torch.arange(count, device=device) * self.longest
            lengths = starts.new_full((count,), self.longest) if padded_lengths is None else padded_lengths.long()
        self.ragged = cu is not None or padded_lengths is not None
        self.is_packed = cu is not None
        self._index = None if index is None else index.long()
        if self._index is not None:
            lengths, starts = lengths[self._index], starts[self._index]
        self.lengths = lengths
        positions = torch.arange(self.longest, device=device)
        tokens = positions < lengths[:, None]  # (R, longest)
        self.mask = tokens if self.ragged else None
        self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        # Rows of the flat given tensor, in the order of the packed layout; and places in the flat padded layout.
        rows = (starts[:, None] + positions)[tokens]
        # The packed layout is a view unless padding is between the sequences, or an index reorders them.
        is_view = self._index is None and padded_lengths is None
        self._rows = None if is_view else rows
        self._places = tokens.flatten().nonzero()[:, 0]

    def padded(self, x: Tensor) -> Tensor:
        """q, k or v as (R, longest, H, D). Padding is zeros, or what the given tensor has there."""
        if not self.is_packed:
            return x if self._index is None else x.index_select(0, self._index)
        return self._pad(self.packed(x))

    def packed(self, x: Tensor) -> Tensor:
        """q, k or v as (T, H, D)."""
        flat = x if self.is_packed else x.flatten(0, 1)
        return flat if self._rows is None else flat.index_select(0, self._rows)

    def from_padded(self, out: Tensor) -> Tensor:
        """A result (R, longest, H, D) in the layout of q."""
        return out.flatten(0, 1).index_select(0, self._places) if self.is_packed else out

    def from_packed(self, out: Tensor) -> Tensor:
        """A result (T, H, D) in the layout of q."""
        return out if self.is_packed else out.unflatten(0, (len(self.lengths), self.longest))

    def _pad(self, packed: Tensor) -> Tensor:
        rows = len(self.lengths) * self.longest
        padded = packed.new_zeros(rows, *packed.shape[1:]).index_copy(0, self._places, packed)
        return padded.unflatten(0, (len(self.lengths), self.longest))


def _composition(inputs: Inputs, softmax: Callable[[Tensor], Tensor]) -> Function:
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    mask = None if keys.mask is None else keys.mask[:, None, None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries.padded(q), keys.padded(k), keys.padded(v)))
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        # The output projection needs contiguous rows of H*D. A peer with another layout pays for the copy.
        return queries.from_padded((softmax(scores) @ v).transpose(1, 2).contiguous())

    return attend


def eager(inputs: Inputs) -> Function:
    return _composition(inputs, lambda scores: scores.softmax(dim=-1))


def liger(inputs: Inputs) -> Function:
    """The eager composition with Liger's softmax kernel. Liger has no cross-attention."""
    from liger_kernel.ops import LigerSoftmaxFunction  # pyright: ignore[reportMissingImports]

    require_cuda(inputs)
    return _composition(inputs, LigerSoftmaxFunction.apply)


def sdpa(inputs: Inputs) -> Function:
    """torch SDPA, restricted to one backend by the peer's context. torch raises if the backend refuses the call."""
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    mask = None if keys.mask is None else keys.mask[:, None, None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries.padded(q), keys.padded(k), keys.padded(v)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return queries.from_padded(out.transpose(1, 2).contiguous())

    return attend


def sdpa_cuda(inputs: Inputs) -> Function:
    require_cuda(inputs)
    return sdpa(inputs)


def flex(inputs: Inputs) -> Function:
    """Compiled FlexAttention. Lengths become a block mask, packed keys one long sequence with a document mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention: Any = torch.compile(flex_attention, dynamic=False)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    device = inputs.leaves["q"].device
    if keys.is_packed:
        documents = torch.arange(len(keys.lengths), device=device)
        of_query, of_key = (documents.repeat_interleave(side.lengths) for side in (queries, keys))
        block_mask = create_block_mask(
            lambda b, h, i, j: of_query[i] == of_key[j], None, None, len(of_query), len(of_key), device
        )

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (queries.packed(q), keys.packed(k), keys.packed(v)))
            out = attention(q, k, v, block_mask=block_mask)[0].transpose(0, 1).contiguous()
            return queries.from_packed(out)

        return packed
    lengths = keys.lengths
    block_mask = None
    if keys.ragged:
        block_mask = create_block_mask(
            lambda b, h, i, j: j < lengths[b], len(lengths), None, queries.longest, keys.longest, device
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries.padded(q), keys.padded(k), keys.padded(v)))
        return queries.from_padded(attention(q, k, v, block_mask=block_mask).transpose(1, 2).contiguous())

    return attend
