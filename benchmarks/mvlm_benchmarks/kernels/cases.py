"""Benchmark cases: those of the ops of `mvlm_kernels`, and the cross-entropy of the LM head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm_kernels.case import PAPER, Case, Draw, Inputs
from mvlm_kernels.cases import timed


def cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """All cases for a batch of `batch` images. The core cases come first, then the others by importance."""
    # A small batch, as on a CPU, gets a small vocabulary too. Captions have 12 tokens on average, 30 % of them masked.
    head = _linear_cross_entropy(round(3.6 * batch), 50_265 if batch >= 32 else 2_048, dtype)
    return sorted([head, *timed(batch, dtype)], key=lambda case: not case.core)


def _linear_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """Cross-entropy of the language-model head, without keeping the logits."""
    width = PAPER.width

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {
            "x": draw.normal(rows, width, dtype=dtype),
            "weight": draw.normal(vocabulary, width, dtype=dtype, scale=width**-0.5),
            "bias": draw.normal(vocabulary, dtype=dtype, scale=0.1),
        }
        return Inputs(leaves, {"targets": draw.integers(vocabulary, rows)})

    def oracle(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), targets)

    def ours(**arguments: Any) -> Tensor:
        return linear_cross_entropy(**arguments)[0]

    item, product = dtype.itemsize, 2 * rows * vocabulary * width
    matrix, states = item * vocabulary * (width + 1), item * rows * width
    # Forward computes the gradients too, and saves them for backward.
    minimum = 2 * matrix + 2 * states + 8 * rows + 4, 2 * matrix + 2 * states + 4
    return Case(
        "linear_cross_entropy", f"{rows} rows of {width}, vocabulary {vocabulary}", dtype, make, ours, oracle, minimum,
        (3 * product, 0), core=True, product=(rows, vocabulary, width), has_kernels=False,
    )  # fmt: skip
