"""Cross-attention composed of torch ops: on a CPU, and on other devices where no kernel runs.

The mathematics is that of ``reference.py``, and tests compare the two. Packed sides are padded, and the attention of
padded sequences is SDPA or two matrix products; :func:`rule` chooses.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.cross_attention.arguments import Options, Sides, check_bounds
from mvlm_kernels.cross_attention.packed import Layout, kept_with, layout_of
from mvlm_kernels.cross_attention.reference import existing, factors_of

Way = Literal["sdpa", "math"]
"""Implementation of attention in torch: SDPA, or "math" for two matrix products with a softmax between."""
Given = tuple[int | None, int | None]
"""max_len_q and max_len_k of a call."""

# In fp32 on two cores attention alone, forward and backward, is faster by matrix products than by SDPA up to so many
# keys, and a step of a run by 2 %. With 197 keys it is as fast or slower, and the probabilities take memory.
_MOST_KEYS_BY_MATH = 128


def rule(device: torch.device, dtype: torch.dtype, keys: int, gradients: bool) -> Way:
    """The faster of "sdpa" and "math" for a call: SDPA on every device but a CPU, and there by dtype and size.

    SDPA's bf16 backward on CPUs runs in scalar code. In fp32 SDPA gains little from a second core where keys are few. A
    forward pass alone is left to SDPA, which is faster on one core. In float64, which is for checks, products have
    second derivatives.

    Args:
        device, dtype: of q, k and v.
        keys: rows of the longest sequence of keys.
        gradients: True if a backward pass may follow.
    """
    if device.type != "cpu":
        return "sdpa"
    if dtype in (torch.bfloat16, torch.float16):
        return "math"
    return "math" if gradients and (keys <= _MOST_KEYS_BY_MATH or dtype == torch.float64) else "sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, sides: Sides, options: Options, given: Given, way: Way) -> Tensor:
    """Output of :func:`~mvlm_kernels.cross_attention.reference.cross_attention_reference`, in q's shape and dtype.

    given: max_len_q and max_len_k of the call. Of a packed side without one the lengths are read.
    """
    _, _, key_index, cu_q, cu_k, _, _ = sides
    layout_q = None if cu_q is None else _layout("q", q, cu_q, given[0], options.max_len_q)
    layout_k = None if cu_k is None else _layout("k", k, cu_k, given[1], options.max_len_k)
    padded_q = q if layout_q is None else layout_q.pad(q)
    exists = None
    if layout_k is not None:
        k, v, exists = layout_k.pad(k), layout_k.pad(v), layout_k.exists
    elif sides.key_lengths is not None or sides.key_mask is not None:
        exists = existing(k.shape[1], sides.key_lengths, sides.key_mask)
        # Padded keys may hold NaN, and 0 * NaN is NaN, so their rows are set to 0 before the products.
        zero = torch.zeros((), dtype=k.dtype, device=k.device)
        k, v = (x.where(exists[..., None, None], zero) for x in (k, v))
    heads = padded_q.transpose(1, 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B', Hk, Lk, D)
    if key_index is not None:
        # Contiguous, as the products read them. The gradients come in that layout too, and are added up in it.
        k, v = (_select(x.contiguous(), key_index) for x in (k, v))
        exists = None if exists is None else exists.index_select(0, key_index)
    some = None
    if way == "sdpa" and exists is not None:
        # SDPA's backends differ on rows without keys (NaN or zeros), so such a row attends to every key here and its
        # output is set to zero below.
        some = exists.any(-1, keepdim=True)  # (B, 1)
        if q.device.type == "cpu" and not torch.compiler.is_compiling() and bool(some.all()):
            some = None
        exists = exists if some is None else exists | ~some
    out = attend_heads(heads, k, v, exists, options=options, way=way)  # (B, H, Lq, D)
    out = out if some is None else out.where(some[..., None, None], torch.zeros((), dtype=out.dtype, device=q.device))
    out = out.transpose(1, 2)
    out = out.contiguous() if layout_q is None else layout_q.unpad(out)
    return out if q.device.type == "cpu" else _nan_past_bounds(out, sides, given, layout_q)


def _layout(name: str, x: Tensor, cu_seqlens: Tensor, given: int | None, most: int) -> Layout:
    """Places of the packed rows x (T, ...) of side `name`, "q" or "k", among padded ones, kept for later calls.

    given: length to which sequences are padded; None reads the longest. most: the longest sequence that is allowed,
    negative if unknown.
    """

    def make() -> Layout:
        if dispatch.checks_values(x.device) and registration.has_values(cu_seqlens):
            check_bounds(name, x, cu_seqlens, most)
        lengths = cu_seqlens.diff()
        longest = given if given is not None else int(lengths.max()) if len(lengths) else 0
        return layout_of(cu_seqlens, longest, x.shape[0])

    return kept_with(cu_seqlens, (name, given, most, x.shape[0]), make)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """x[index], with a backward that adds up repeated rows in a fixed order."""
    # The backward of index_select is deterministic on a CPU and not on CUDA; that of indexing is the reverse.
    return x.index_select(0, index) if x.device.type == "cpu" else x[index.long()]


def _nan_past_bounds(out: Tensor, sides: Sides, given: Given, layout_q: Layout | None) -> Tensor:
    """The output with NaN in rows whose query or key sequence is longer than its max_len, which only the GPU knows.

    given: max_len_q and max_len_k, None where not given. layout_q: of packed queries, None for dense ones.
    """
    packed = (sides.cu_seqlens_q, given[0], None), (sides.cu_seqlens_k, given[1], sides.key_index)
    for bounds, most, index in packed:
        if bounds is None or most is None:
            continue
        bad = bounds.diff() > most
        bad = bad if index is None else bad[index.long()]
        bad = bad if layout_q is None else F.pad(bad, (0, 1))[layout_q.sequence_of_row]
        out = out.masked_fill(bad.view(-1, *(1,) * (out.dim() - 1)), torch.nan)
    return out


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exists: Tensor | None = None,
    *,
    options: Options | None = None,
    way: Way | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` of padded sequences, heads first.

    q (B, H, Lq, D), k and v (B, Hk, Lk, D), Hk = H or a divisor of it; exists bool (B, Lk), True = the key exists, at
    least one in each row. options: scale and dropout; by default D ** -0.5 and none. way: by default that of
    :func:`rule`. Returns (B, H, Lq, D).
    """
    if way is None:
        way = rule(q.device, q.dtype, k.shape[2], torch.is_grad_enabled())
    usual = q.shape[-1] ** -0.5
    scale, rate = (usual, 0.0) if options is None else (options.scale, options.dropout_p)
    grouped = q.shape[1] != k.shape[1]
    if way == "sdpa":
        mask = None if exists is None else exists[:, None, None, :]  # (B, 1, 1, Lk)
        own = None if scale == usual else scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, scale=own, enable_gqa=grouped)
    (batch, heads, rows, _), k_heads = q.shape, k.shape[1]
    group = heads // k_heads if k_heads else 1
    kept = None
    if options is not None and rate:
        factors = factors_of(options, (batch, heads, rows, k.shape[2]), torch.promote_types(q.dtype, torch.float32))
        kept = factors.view(batch * k_heads, group * rows, k.shape[2]).transpose(1, 2)
    if grouped:  # the query heads of a key head become rows of its product
        q = q.unflatten(1, (k_heads, group)).flatten(2, 3)
    absent = None
    if exists is not None:
        # The lowest finite number instead of -inf: the softmax of a row without keys is then uniform over zero values,
        # and its output and gradient are 0, not NaN.
        dtype = _wide(q.dtype)
        absent = exists.new_zeros(exists.shape, dtype=dtype).masked_fill_(~exists, torch.finfo(dtype).min)
        absent = absent[:, None, :, None].expand(-1, k_heads, -1, -1)  # (B, Hk, Lk, 1)
    q, k, v = (x.contiguous().flatten(0, 1) for x in (q, k, v))  # (B*Hk, L, D)
    out: Any = _Products.apply(q, k, v, absent, kept, scale)
    out = out.unflatten(0, (batch, k_heads))
    return out.unflatten(2, (group, rows)).flatten(1, 2) if grouped else out


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the scores: unscaled ones can be too large for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _softmax(q: Tensor, k: Tensor, absent: Tensor | None, scale: float) -> Tensor:
    """Attention probabilities (B*Hk, Lk, Lq), transposed, of q (B*Hk, Lq, D) and k (B*Hk, Lk, D): softmax over Lk.

    absent: (B, Hk, Lk, 1), added to the scores, or None.
    """
    dtype = _wide(q.dtype)
    unused = q.new_empty(len(q), k.shape[1], q.shape[1], dtype=dtype)
    scores = torch.baddbmm(unused, k.to(dtype), q.to(dtype).transpose(1, 2), beta=0, alpha=scale)
    if absent is not None:
        scores.view(*absent.shape[:3], scores.shape[-1]).add_(absent)
    return scores.softmax(1)


class _Products(torch.autograd.Function):
    """Attention by batched matrix products: q (B*Hk, Lq, D), k and v (B*Hk, Lk, D) -> (B*Hk, Lq, D).

    Scores are transposed, (B*Hk, Lk, Lq): torch's softmax over the last dimension is scalar code for a few keys in
    bf16, and several times as fast over the second. The probabilities are kept for the backward: on a CPU to compute
    them again would be a third of its work.

    absent: (B, Hk, Lk, 1), added to the scores, or None. kept: factors (B*Hk, Lk, Lq) of a dropout, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, absent: Tensor | None, kept: Tensor | None, scale: float
    ) -> Tensor:
        with dispatch.without_autocast(q.device):  # it would copy the scores to fp32 and back
            p = _softmax(q, k, absent, scale)
            out = (p if kept is None else p * kept).to(v.dtype).transpose(1, 2) @ v
        ctx.save_for_backward(q, k, v, p, absent, kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, absent, kept = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            p = _softmax(q, k, absent, ctx.scale)  # with create_graph=True: the kept one has no graph
        grad, dq, dk, dv = grads[0].contiguous(), None, None, None
        need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
        if need_dv:
            dv = (p if kept is None else p * kept).to(v.dtype) @ grad
        if need_dq or need_dk:
            dp = v @ grad.transpose(1, 2)
            dp = (dp if kept is None else dp * kept).to(p.dtype)
            # A key that does not exist has p = 0, so its score has no gradient.
            ds = torch.ops.aten._softmax_backward_data(dp, p, 1, p.dtype)
            q_wide, k_wide = q.to(p.dtype), k.to(p.dtype)
            if need_dq:
                dq = torch.baddbmm(torch.empty_like(q_wide), ds.transpose(1, 2), k_wide, beta=0, alpha=ctx.scale)
                dq = dq.to(q.dtype)
            if need_dk:
                dk = torch.baddbmm(torch.empty_like(k_wide), ds, q_wide, beta=0, alpha=ctx.scale).to(k.dtype)
        return dq, dk, dv, None, None, None
