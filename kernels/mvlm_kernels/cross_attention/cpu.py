"""Cross-attention on CPU tensors, composed of torch ops for speed and differentiated by autograd.

Eager calls on CPU tensors run this. The mathematics is that of ``reference.py``, and tests compare the two. Three
choices are made for a CPU. Heads are moved to the front first, because batched products on contiguous matrices are
several times faster than ``einsum`` on (B, L, H, D). Two plain products replace SDPA, whose bfloat16 backward is scalar
code and four times slower. The backward keeps the probabilities: with at most 128 keys they are small, and recomputing
them from a saved log-sum-exp, as the kernels do to save memory traffic, would be a third of the backward's work here.
"""

import torch
from torch import Tensor

from mvlm_kernels.cross_attention.reference import unpack_key_mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    key_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Output of :func:`~mvlm_kernels.cross_attention.reference.cross_attention_reference`, in q's shape and dtype."""
    inside_q, inside_k = _inside(cu_seqlens_q), _inside(cu_seqlens_k)
    dense_q = q if inside_q is None else _spread(q, inside_q)
    exists = inside_k
    if inside_k is not None:
        k, v = _spread(k, inside_k), _spread(v, inside_k)
    elif key_lengths is not None or key_mask is not None:
        exists = _existing(k.shape[1], key_lengths, key_mask)
        missing = (~exists).flatten().nonzero().squeeze(1)
        # Padded keys may hold NaN, and 0 * NaN is NaN, so their rows are set to 0 before the products.
        k, v = (x.flatten(0, 1).index_fill(0, missing, 0).view_as(x) for x in (k, v))
    if key_index is not None:
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
        exists = None if exists is None else exists.index_select(0, key_index)
    q_bhqd, k_bhkd, v_bhkd = (x.transpose(1, 2).contiguous() for x in (dense_q, k, v))

    s = q_bhqd @ k_bhkd.transpose(2, 3)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if exists is None:
        s = s * scale
    else:
        # The lowest finite number instead of -inf: the softmax of a row without keys is then uniform over zero values,
        # and its output and gradient are 0, not NaN.
        lowest = s.new_zeros(exists.shape).masked_fill_(~exists, torch.finfo(s.dtype).min)
        s = torch.add(lowest[:, None, None, :], s, alpha=scale)
    out = (s.softmax(-1).to(q.dtype) @ v_bhkd).transpose(1, 2)  # (B, Lq, H, D)
    return out.contiguous() if inside_q is None else _gathered(out, inside_q, q.shape[0])


def _inside(cu_seqlens: Tensor | None) -> Tensor | None:
    """bool (B, longest), True = the row belongs to the sequence; None for a dense side."""
    if cu_seqlens is None:
        return None
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def _existing(length: int, key_lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """bool (B', length), True = the key exists."""
    if key_mask is not None and key_mask.dtype != torch.bool:
        key_mask = unpack_key_mask(key_mask, length)
    if key_lengths is None:
        assert key_mask is not None
        return key_mask
    exists = torch.arange(length, device=key_lengths.device) < key_lengths[:, None]
    return exists if key_mask is None else exists & key_mask


def _spread(x: Tensor, inside: Tensor) -> Tensor:
    """Packed (T, H, D) -> (B, longest, H, D), zeros past each sequence's end. Rows after the last are not read."""
    rows = inside.flatten().nonzero().squeeze(1)
    padded = x.new_zeros((inside.numel(), *x.shape[1:])).index_copy(0, rows, x[: len(rows)])
    return padded.view(*inside.shape, *x.shape[1:])


def _gathered(x: Tensor, inside: Tensor, total: int) -> Tensor:
    """(B, longest, H, D) -> packed (total, H, D), zeros after the last sequence."""
    rows = inside.flatten().nonzero().squeeze(1)
    packed = x.flatten(0, 1).index_select(0, rows)
    rest = total - len(rows)
    return packed if rest == 0 else torch.cat([packed, packed.new_zeros((rest, *packed.shape[1:]))])
