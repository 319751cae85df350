"""Cross-attention on CPU tensors, composed of torch ops for speed and differentiated by autograd.

Eager calls on CPU tensors run this. The mathematics is that of ``reference.py``, and tests compare the two. Three
choices are made for a CPU:

- Heads are moved to the front first, because batched products on contiguous matrices are several times faster than
  ``einsum`` on (B, L, H, D).
- Two plain products replace SDPA, whose bfloat16 backward is scalar code and four times slower.
- The probabilities are kept for the backward. They are small, because one side, queries or keys, is at most 128 long.
  The kernels recompute them from a saved log-sum-exp to save memory traffic; on a CPU that would be a third of the
  backward's work.
"""

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import Options, Sides
from mvlm_kernels.cross_attention.reference import factors_of, unpack_key_mask


def attend(q: Tensor, k: Tensor, v: Tensor, sides: Sides, options: Options) -> Tensor:
    """Output of :func:`~mvlm_kernels.cross_attention.reference.cross_attention_reference`, in q's shape and dtype."""
    key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k, _, _ = sides
    scale = options.scale
    valid_q, valid_k = _valid_rows(cu_seqlens_q), _valid_rows(cu_seqlens_k)
    dense_q = q if valid_q is None else _pad_packed(q, valid_q)
    exists = valid_k
    if valid_k is not None:
        k, v = _pad_packed(k, valid_k), _pad_packed(v, valid_k)
    elif key_lengths is not None or key_mask is not None:
        exists = _existing(k.shape[1], key_lengths, key_mask)
        missing = (~exists).flatten().nonzero().squeeze(1)
        # Padded keys may hold NaN, and 0 * NaN is NaN, so their rows are set to 0 before the products.
        k, v = (x.flatten(0, 1).index_fill(0, missing, 0).view_as(x) for x in (k, v))
    if key_index is not None:
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
        exists = None if exists is None else exists.index_select(0, key_index)
    q_bhqd, k_bhkd, v_bhkd = (x.transpose(1, 2).contiguous() for x in (dense_q, k, v))
    heads, k_heads = dense_q.shape[2], k.shape[2]
    if heads != k_heads:  # the query heads of a key head become rows of its product
        q_bhqd = q_bhqd.unflatten(1, (k_heads, heads // k_heads)).flatten(2, 3)

    if q.dtype == torch.float16:  # unscaled scores can be too large for it
        q_bhqd, k_bhkd = q_bhqd.float(), k_bhkd.float()
    with dispatch.without_autocast(q.device):  # it would cast them back
        s = q_bhqd @ k_bhkd.transpose(2, 3)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if exists is None:
        s = s * scale
    else:
        # The lowest finite number instead of -inf: the softmax of a row without keys is then uniform over zero values,
        # and its output and gradient are 0, not NaN.
        lowest = s.new_zeros(exists.shape).masked_fill_(~exists, torch.finfo(s.dtype).min)
        s = torch.add(lowest[:, None, None, :], s, alpha=scale)
    p = s.softmax(-1)
    if options.dropout_p:
        shape = (dense_q.shape[0], heads, dense_q.shape[1], k.shape[1])
        p = p * factors_of(options, shape, p.dtype).view_as(p)
    out = p.to(q.dtype) @ v_bhkd
    if heads != k_heads:
        out = out.unflatten(2, (heads // k_heads, dense_q.shape[1])).flatten(1, 2)
    out = out.transpose(1, 2)  # (B, Lq, H, D)
    return out.contiguous() if valid_q is None else _pack(out, valid_q, q.shape[0])


def _valid_rows(cu_seqlens: Tensor | None) -> Tensor | None:
    """Rows of padded sequences that hold a packed row: bool (B, longest), True = the row exists; None if dense."""
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


def _pad_packed(x: Tensor, valid: Tensor) -> Tensor:
    """Packed (T, H, D) -> (B, longest, H, D), zeros past each sequence's end.

    valid: see :func:`_valid_rows`. Rows of x after the last sequence are not read.
    """
    rows = valid.flatten().nonzero().squeeze(1)
    padded = x.new_zeros((valid.numel(), *x.shape[1:])).index_copy(0, rows, x[: len(rows)])
    return padded.view(*valid.shape, *x.shape[1:])


def _pack(x: Tensor, valid: Tensor, total: int) -> Tensor:
    """(B, longest, H, D) -> packed (total, H, D), zeros after the last sequence."""
    rows = valid.flatten().nonzero().squeeze(1)
    packed = x.flatten(0, 1).index_select(0, rows)
    rest = total - len(rows)
    return packed if rest == 0 else torch.cat([packed, packed.new_zeros((rest, *packed.shape[1:]))])
