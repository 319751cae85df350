"""The residual stream of a block, and the sum and norm at the end of each sub-layer, in one op.

Shape legend: B batch, L rows, T packed rows, C width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.device import compute_dtype
from mvlm_kernels import add_layer_norm


class Residual(NamedTuple):
    """Input and output of a block."""

    x: Tensor
    """(B, L, C), or packed (T, C): the residual stream, fp32 under autocast."""
    y: Tensor | None = None
    """Rows of the same shape, or None. Of a pre-norm block, the output of its feed-forward, which the next `add_norm`
    adds to x; with its bias, because FSDP frees a block's parameters when the block ends. Of a post-norm block, x in
    the dtype of matrix products."""


class Branch(NamedTuple):
    """Output of a sub-layer, which is added to the residual stream."""

    rows: Tensor
    """(..., C)."""
    bias: Tensor | None = None
    """(C,), still to be added to the rows, or None."""


def adds_bias_later(device: torch.device) -> bool:
    """True if biases are better added by the next op than by the matrix product.

    On a GPU the next op is a kernel that gives the bias's gradient in passing. On a CPU it would be one more pass.
    """
    return device.type == "cuda"


def project(layer: nn.Linear, x: Tensor) -> Branch:
    """Apply a linear layer at the end of a sub-layer: (..., C') -> (..., C)."""
    if adds_bias_later(x.device):
        return Branch(F.linear(x, layer.weight), layer.bias)
    return Branch(layer(x))


def add_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    branch: Branch | None,
    *,
    post_norm: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream x (..., C) and normalise the sum.

    Returns the stream after that and the norm in `out_dtype`, by default the dtype of matrix products. The stream is
    the sum, or with `post_norm` the norm.
    """
    rows, bias = branch or Branch(x, None)
    return add_layer_norm(
        x,
        None if branch is None else rows,
        norm.weight,
        norm.bias,
        norm.eps,
        y_bias=bias,
        out_dtype=out_dtype or compute_dtype(x),
        post_norm=post_norm,
    )
