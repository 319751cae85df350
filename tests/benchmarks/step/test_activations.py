"""Peak activation memory of graphs whose allocations can be counted by hand."""

import pytest
import torch
from torch import nn

from mvlm_benchmarks.step.activations import peak_mb

KILO = 1000 * 1000 * 4 / 1e6
"""Megabytes of a (1000, 1000) float32."""


def test_peak_is_that_of_a_count_by_hand() -> None:
    x = nn.Parameter(torch.ones(1000, 1000))
    # exp keeps its result: three of them in forward. In backward the last result times the expanded gradient makes a
    # fourth, and then one is freed for each that is made; x's own gradient is not counted.
    assert peak_mb(lambda: x.exp().exp().exp().sum().backward(), [x], "cpu") == pytest.approx(4 * KILO, rel=1e-3)
    assert x.grad is None
    # x * 2 * 2 keeps nothing for backward, but two tensors are alive while the second product runs.
    assert peak_mb(lambda: (x * 2 * 2).sum().backward(), [x], "cpu") == pytest.approx(2 * KILO, rel=1e-3)
    # A parameter used twice: the first of its two gradients waits for the second; the sum is the gradient. sin and cos
    # keep x itself; forward holds one result at a time. Backward: cos(x), times the gradient.
    found = peak_mb(lambda: (x.sin().sum() + x.cos().sum()).backward(), [x], "cpu")
    assert KILO <= found <= 3.01 * KILO
