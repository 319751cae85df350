"""A linear layer inside autograd Functions, whose operands have one dtype already; see :func:`linear`."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels import dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x (.., C), weight (D, C) and bias (D,) of one dtype, under autocast too: (.., D) in this dtype.

    In bf16 on a CPU the product adds the bias to its sums. ``F.linear`` writes the bias to all rows of the output and
    reads it again, which takes a third of the product's time in narrow layers. The digits are the same.
    """
    in_bf16 = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if bias is not None and in_bf16 and x.numel() and _has_bf16():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    with dispatch.without_autocast(x.device):
        return F.linear(x, weight, bias)


@functools.cache
def _has_bf16() -> bool:
    """True if oneDNN has products of bf16 on this processor, and torch an op for them with a bias."""
    name = "_linear_pointwise"
    return hasattr(torch.ops.mkldnn, name) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
