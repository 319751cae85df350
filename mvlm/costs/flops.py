"""FLOP formulas for `torch.utils.flop_counter`: our kernels, and attention independent of its backend.

A product of (m, k) and (k, n) counts 2 m k n FLOPs; other operations count nothing. Attention counts two products
forward and four backward for every backend. Recomputation of scores in backward is not counted, so that backends
compare equal.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mvlm_kernels  # noqa: F401  (defines torch.ops.mvlm_kernels)

aten, ours = torch.ops.aten, torch.ops.mvlm_kernels


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of the forward pass of SDPA: q (B, H, Lq, D), k (B, H, Lk, D), v (B, H, Lk, Dv)."""
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 2 * attention(q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, *sides: Any, out_val: Any = None) -> int:
    """FLOPs of the forward pass of `mvlm_kernels.cross_attention`, padded or packed, from its operator's arguments.

    Exact if at most one side is packed. If both are, every key sequence counts with the longest length, because lengths
    are values on the device. Padding keys count too.
    """
    _, _, key_index, packed_q, packed_k, _, _, _, _, longest_k = sides[:10]
    heads, width = q.shape[-2:]
    rows = q.numel() // (heads * width)
    if packed_k is not None and packed_q is None and key_index is None:
        pairs = q.shape[1] * k.shape[0]  # every packed key is read by the Lq queries of its sequence
    else:
        pairs = rows * (k.shape[1] if packed_k is None else int(longest_k))
    return 2 * pairs * heads * 2 * width


def cross_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None) -> int:
    """FLOPs of the backward pass of `mvlm_kernels.cross_attention`, by which inputs need a gradient.

    Four products for all gradients, three for dK and dV without dQ, two for only dQ: dP once, one for dQ, two for dK
    and dV.
    """
    *sides, need_dq, need_dkv = rest[2:]
    products = 1 + need_dq + 2 * need_dkv if need_dq or need_dkv else 0
    return products * cross_attention(q, k, v, *sides) // 2


def linear_with_bias(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of oneDNN's linear layer with bias, as the ops use it in bf16: x (.., C), weight (D, C)."""
    return 2 * x.numel() * weight.shape[0]


def contrastive_terms(image: Tensor, text: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of the logits of image (n, E) and text (G, E): one product. Backward has two, for their gradients."""
    return 2 * image.numel() * text.shape[0]


def contrastive_terms_backward(
    grad: Tensor, column_grad: Tensor, image: Tensor, text: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * contrastive_terms(image, text)


class _Raw:
    """FLOP formula that takes an operator's own arguments. torch's counter passes only shapes to a plain function."""

    _get_raw = True  # read by torch's counter

    def __init__(self, formula: Callable[..., int]) -> None:
        self._formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self._formula(*args, **kwargs)


# These replace torch's formulas, which count recomputation in SDPA's backward and know no CPU attention.
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
    ours.contrastive_terms: _Raw(contrastive_terms),
    ours.contrastive_terms_backward: _Raw(contrastive_terms_backward),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # builds without oneDNN have none
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _Raw(linear_with_bias)


def counter() -> FlopCounterMode:
    """Context that counts FLOPs; `get_total_flops()` returns them."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)
