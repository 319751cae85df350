"""Formulas for `torch.utils.flop_counter`: what it does not know, and attention by its mathematics.

A product of (m, k) and (k, n) is 2 m k n operations; what is not a matrix product is not counted. Attention is its two
products forward and four backward whichever kernel runs: those that recompute the scores are not charged for it, so
that counts compare mathematics.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mvlm_kernels  # noqa: F401  (defines torch.ops.mvlm_kernels)

aten, ours = torch.ops.aten, torch.ops.mvlm_kernels


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """SDPA: q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv)."""
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 2 * attention(q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, *sides: Any, out_val: Any = None) -> int:
    """mvlm_kernels.cross_attention, dense or packed, by its operator's arguments.

    Exact where at most one side is packed; where both are, every sequence counts as long as the longest, because
    lengths are values on the device. Keys that do not exist count like the others.
    """
    _, _, key_index, packed_q, packed_k, _, _, longest_k = sides[:8]
    heads, width = q.shape[-2:]
    rows = q.numel() // (heads * width)
    if packed_k is not None and packed_q is None and key_index is None:
        pairs = q.shape[1] * k.shape[0]  # every packed key is read by the Lq queries of its sequence
    else:
        pairs = rows * (k.shape[1] if packed_k is None else int(longest_k))
    return 2 * pairs * heads * 2 * width


def cross_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Two products for dQ (dP, then dQ) and two for dK and dV (dP counts once): four in all, three or two for one."""
    *sides, need_dq, need_dkv = rest[2:]
    products = 1 + need_dq + 2 * need_dkv if need_dq or need_dkv else 0
    return products * cross_attention(q, k, v, *sides) // 2


def linear_pixel_loss(hidden: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    """hidden (B, K, C), weight (3*P*P, C): the pixel head's product."""
    return 2 * hidden.numel() * weight.shape[0]


def linear_pixel_loss_backward(
    grad: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor, hidden_too: bool, weight_too: bool, *_: Any, **__: Any
) -> int:
    return (hidden_too + weight_too) * linear_pixel_loss(hidden, weight)


class _Raw:
    """A formula of tensors instead of shapes: arguments in other places than SDPA's have to be told apart."""

    _get_raw = True  # torch's counter reads it, and passes tensors where it is true

    def __init__(self, formula: Callable[..., int]) -> None:
        self._formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self._formula(*args, **kwargs)


# On CUDA and on the CPU; torch's own formulas charge SDPA's backward for recomputing and count the CPU's as nothing.
FORMULAS: dict[Any, Callable[..., int]] = {
    **{
        getattr(aten, f"_scaled_dot_product_{kind}"): _Raw(attention)
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
    **{
        getattr(aten, f"_scaled_dot_product_{kind}_backward"): _Raw(attention_backward)
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    },
    ours.cross_attention: _Raw(cross_attention),
    ours.cross_attention_backward: _Raw(cross_attention_backward),
    ours.linear_pixel_loss: _Raw(linear_pixel_loss),
    ours.linear_pixel_loss_backward: _Raw(linear_pixel_loss_backward),
}


def counter() -> FlopCounterMode:
    """A context that counts; `get_total_flops()` tells."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)
