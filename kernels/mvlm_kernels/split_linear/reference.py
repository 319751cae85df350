"""Specification of the backward half of ``split_linear`` in plain torch."""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype


def stack_rows(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Parts (R, W) side by side, (R, N, W), and their sums over the rows, (N, W) in float32 or float64."""
    stacked = torch.stack(parts, dim=1)
    return stacked, stacked.sum(0, dtype=compute_dtype(stacked.dtype))
