"""Specification of GELU with a bias in front and of its gradient, in plain torch; also their implementation on a CPU.

Legend: R rows, C width. The GELU is the exact one, x Phi(x).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _with_bias(h: Tensor, h_bias: Tensor | None) -> Tensor:
    """h + h_bias in float32 (float64 for float64); h itself without a bias."""
    if h_bias is None:
        return h
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.to(wide) + h_bias.to(wide)


def gelu(h: Tensor, h_bias: Tensor | None) -> Tensor:
    """GELU of h + h_bias: h (.., C), h_bias (C,) -> (.., C) in h's dtype."""
    return F.gelu(_with_bias(h, h_bias)).to(h.dtype).contiguous()


def gelu_backward(grad: Tensor, h: Tensor, h_bias: Tensor | None, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h (.., C), the GELU again (.., C), and the gradient of h_bias (C,).

    The first two have h's dtype. The GELU is empty without `again`, the last gradient without an h_bias.
    """
    x = _with_bias(h, h_bias)
    dx = torch.ops.aten.gelu_backward(grad.to(x.dtype), x)
    sums = h.new_empty(0, dtype=torch.promote_types(h.dtype, torch.float32))
    if h_bias is not None:
        sums = dx.flatten(0, -2).sum(0)
    activated = F.gelu(x).to(h.dtype).contiguous() if again else h.new_empty(0)
    return dx.to(h.dtype).contiguous(), activated, sums
