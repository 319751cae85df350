"""Cross-attention in plain torch: the specification of the kernels, and the op's implementation without them.

    s[b,h,i,j] = scale * q[b,i,h,:] . k[r(b),j,h,:]        r(b) = key_index[b], or b
    p[b,h,i,:] = softmax of s[b,h,i,:] over the keys that exist; a row without keys is zeros
    out[b,i,h,:] = sum_j p[b,h,i,j] z[b,h,i,j] v[r(b),j,h,:]    z = 1, or the factors of a dropout (:func:`kept`)

With Hk < H heads of k and v, head h reads head h // (H // Hk) of them.

Shape legend: B query sequences, B' key sequences, Lq, Lk rows of each, Tq, Tk packed rows, H heads of q, Hk of k and v,
D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import check_tensor
from mvlm_kernels.cross_attention.arguments import Options, Sides


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Specification of :func:`mvlm_kernels.cross_attention`, in any floating dtype, differentiable by autograd.

    Takes those of its arguments that determine the result, and returns the output in q's shape and dtype. A dropout
    needs its seed, an int64 tensor (). Lengths are read on the host, which on a GPU waits for the device.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    sides = Sides(key_lengths, key_mask, key_index, cu_seqlens_q, cu_seqlens_k)
    return reference_forward(q, k, v, sides, Options(scale, -1, -1, dropout_p, seed))[0]


def reference_forward(q: Tensor, k: Tensor, v: Tensor, sides: Sides, options: Options) -> tuple[Tensor, Tensor]:
    """Output, in q's shape and dtype, and base-2 log-sum-exp of the scaled scores, (B, H, Lq) or packed (H, Tq).

    The log-sum-exp of a row without keys is -inf. It is in base 2 as in the kernels, because the backward may run on
    another backend than the forward.
    """
    cu_seqlens_q, key_index = sides.cu_seqlens_q, sides.key_index
    q_bqhd = _padded(q, cu_seqlens_q)
    k_bkhd, v_bkhd, exists = _keys(k, v, sides)
    if key_index is not None:
        k_bkhd, v_bkhd, exists = (x[key_index.long()] for x in (k_bkhd, v_bkhd, exists))
    k_bkhd, v_bkhd = (_for_each_head(x, q.shape[-2]) for x in (k_bkhd, v_bkhd))
    s = _scores(q_bqhd, k_bkhd, exists, options.scale)
    lse = s.logsumexp(-1)  # (B, H, Lq)
    p = _probabilities(s, lse)
    if options.dropout_p:
        p = p * factors_of(options, tuple(p.shape), p.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", p.to(q.dtype), v_bkhd)
    if cu_seqlens_q is not None:
        out = _packed(out, cu_seqlens_q, q.shape[0])
        lse = _packed(lse.transpose(1, 2), cu_seqlens_q, q.shape[0]).T  # (H, Tq)
    return out.contiguous(), (lse / math.log(2)).contiguous()


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sides: Sides, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes, from the gradient of the output and the saved log-sum-exp.

    With delta_i = sum_j p_ij dp_ij:  dv = (p z)^T do,  dp = z do v^T,  ds = p (dp - delta),
    dq = scale ds k,  dk = scale ds^T q.
    """
    cu_seqlens_q, cu_seqlens_k, key_index = sides.cu_seqlens_q, sides.cu_seqlens_k, sides.key_index
    q_bqhd, do = _padded(q, cu_seqlens_q), _padded(grad, cu_seqlens_q)
    lse = lse * math.log(2)
    lse = _padded(lse.T, cu_seqlens_q).transpose(1, 2) if cu_seqlens_q is not None else lse
    k_rows, v_rows, exists = _keys(k, v, sides)
    k_bkhd, v_bkhd = k_rows, v_rows
    if key_index is not None:
        k_bkhd, v_bkhd, exists = (x[key_index.long()] for x in (k_rows, v_rows, exists))
    k_bkhd, v_bkhd = (_for_each_head(x, q.shape[-2]) for x in (k_bkhd, v_bkhd))
    s = _scores(q_bqhd, k_bkhd, exists, options.scale)
    p = _probabilities(s, lse)  # (B, H, Lq, Lk), float32 or float64
    dp = torch.einsum("bqhd,bkhd->bhqk", do, v_bkhd).to(p.dtype)
    used = p
    if options.dropout_p:
        z = factors_of(options, tuple(p.shape), p.dtype)
        used, dp = p * z, dp * z
    dv = torch.einsum("bhqk,bqhd->bkhd", used.to(q.dtype), do)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * options.scale
    ds = ds.to(q.dtype)
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, k_bkhd)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q_bqhd)
    dk, dv = (_summed_by_group(x, k.shape[-2]) for x in (dk, dv))
    if key_index is not None:
        dk, dv = (_summed_by_row(x, key_index, len(k_rows)) for x in (dk, dv))
    if cu_seqlens_q is not None:
        dq = _packed(dq, cu_seqlens_q, q.shape[0])
    if cu_seqlens_k is not None:
        dk, dv = (_packed(x, cu_seqlens_k, k.shape[0]) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def pack_key_mask(mask: Tensor) -> Tensor:
    """Pack a key mask into bits: bool (B', Lk), True = the key exists -> int64 (B', ceil(Lk / 64)).

    Bit j % 64 of word j // 64 is key j. Packing once serves every layer that reads the same mask. Raises ValueError
    for a mask that is not bool, or not of two dimensions.
    """
    check_tensor("mask", mask, (torch.bool,))
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape (sequences, keys), got {tuple(mask.shape)}")
    words = (mask.shape[1] + 63) // 64
    bits = F.pad(mask, (0, words * 64 - mask.shape[1])).view(mask.shape[0], words, 64)
    return (bits.long() << torch.arange(64, device=mask.device)).sum(-1)


def unpack_key_mask(words: Tensor, length: int) -> Tensor:
    """int64 words of :func:`pack_key_mask` -> bool (B', length), True = the key exists."""
    bits = (words[:, :, None] >> torch.arange(64, device=words.device)) & 1
    return bits.flatten(1)[:, :length].bool()


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """k or v (B, Lk, Hk, D) -> (B, Lk, heads, D): each head repeated for its group of query heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _summed_by_group(x: Tensor, heads: int) -> Tensor:
    """Gradients (B, Lk, H, D) of each query head -> (B, Lk, heads, D), in float32 or float64."""
    if x.shape[2] == heads:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unflatten(2, (heads, -1)).sum(3).to(x.dtype)


def _scores(q: Tensor, k: Tensor, exists: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, H, Lq, Lk) in float32 or float64, -inf where the key does not exist."""
    if q.dtype == torch.float16:  # unscaled scores can be too large for it
        q, k = q.float(), k.float()
    with dispatch.without_autocast(q.device):  # it would cast them back
        s = torch.einsum("bqhd,bkhd->bhqk", q, k)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    return s.masked_fill(~exists[:, None, None, :], -torch.inf)


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    # A row without keys has lse = -inf, and -inf - -inf is NaN in value and gradient, so such a row subtracts 0.
    return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def existing(length: int, key_lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """bool (B', length), True = the key exists. At least one of the two is given."""
    if key_mask is not None and key_mask.dtype != torch.bool:
        key_mask = unpack_key_mask(key_mask, length)
    if key_lengths is None:
        assert key_mask is not None
        return key_mask
    exists = torch.arange(length, device=key_lengths.device) < key_lengths[:, None]
    return exists if key_mask is None else exists & key_mask


def _keys(k: Tensor, v: Tensor, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
    """k and v as (B', Lk, H, D) with zeros where no key exists, and exists (B', Lk), True = the key exists."""
    lengths, cu_seqlens = sides.key_lengths, sides.cu_seqlens_k
    if cu_seqlens is not None:
        k, v = _padded(k, cu_seqlens), _padded(v, cu_seqlens)
        lengths = cu_seqlens.diff()
    if lengths is None and sides.key_mask is None:
        return k, v, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    exists = existing(k.shape[1], lengths, sides.key_mask)
    zero = torch.zeros((), dtype=k.dtype, device=k.device)
    # where and not a product: a padded key may hold NaN.
    return k.where(exists[..., None, None], zero), v.where(exists[..., None, None], zero), exists


def _padded(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Packed (T, ...) -> (B, longest, ...), zeros past each sequence's end. Returns a dense x unchanged.

    Reads the longest length, which on a GPU waits for the device.
    """
    if cu_seqlens is None:
        return x
    lengths = cu_seqlens.diff().long()
    longest = int(lengths.max()) if len(lengths) else 0
    row = torch.arange(longest, device=x.device)
    inside = row < lengths[:, None]  # (B, longest)
    rows = torch.where(inside, cu_seqlens[:-1, None].long() + row, 0)
    padded = x[rows] if x.shape[0] else x.new_zeros(rows.shape + x.shape[1:])
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return padded.where(inside.reshape(inside.shape + (1,) * (x.dim() - 1)), zero)


def _packed(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """(B, longest, ...) -> packed (total, ...), zeros in rows that belong to no sequence."""
    lengths = cu_seqlens.diff().long()
    row = torch.arange(x.shape[1], device=x.device)
    inside = row < lengths[:, None]  # (B, longest)
    rows = (cu_seqlens[:-1, None].long() + row)[inside]
    return x.new_zeros((total, *x.shape[2:])).index_put((rows,), x[inside])


def _summed_by_row(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sum x (B, ...) into (rows, ...) by index, in the order of B, in float32 or float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # index_put sorts its indices on a GPU, where index_add would use atomics.
    return wide.new_zeros((rows, *x.shape[1:])).index_put((index.long(),), wide, accumulate=True).to(x.dtype)


# ---- Dropout of attention probabilities as a function of a seed and of indices
#
# A word of Philox-4x32 decides whether the probability of query sequence b, query head h, query i and key j is kept.
# The 64-bit seed is the key of Philox, (j // 4, i, h, b) its counter, and j % 4 the word. So forward and backward, all
# tiles, all layouts and all backends draw the same bits, and no mask is stored. ``tile_io.kept`` computes the same in a
# kernel. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There 7 rounds are the fewest
# that pass TestU01's BigCrush.

ROUNDS = 7
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device, int64 (), without waiting for the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Smallest 24-bit word that is kept; p is the probability to drop."""
    return round(p * 2**24)


def factors_of(options: Options, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """:func:`kept` for the dropout of a call."""
    assert options.seed is not None, "the public function draws one"
    return kept(options.seed, shape, options.dropout_p, dtype)


def kept(seed: Tensor, shape: tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """Factors (B, H, Lq, Lk) of the probabilities: 1 / (1 - p) where kept, 0 where dropped. seed: int64 ()."""
    sizes = *shape[:3], (shape[3] + 3) // 4
    b, h, i, quad = (
        torch.arange(size, device=seed.device).view([-1 if axis == at else 1 for axis in range(4)])
        for at, size in enumerate(sizes)
    )
    words = torch.stack(torch.broadcast_tensors(*philox((quad, i, h, b), seed, ROUNDS)), dim=-1).flatten(-2)
    return ((words[..., : shape[3]] >> 8) >= threshold(p)).to(dtype) / (1 - p)


def philox(counter: tuple[Tensor, ...], seed: Tensor, rounds: int) -> tuple[Tensor, ...]:
    """Four words of Philox-4x32, each below 2^32 in an int64 tensor, of counters that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW
    for _ in range(rounds):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * x. The product itself would overflow int64, whose low bits stay right."""
    high = ((factor >> 16) * x + (((factor & 0xFFFF) * x) >> 16)) >> 16
    return high, (factor * x) & _LOW
