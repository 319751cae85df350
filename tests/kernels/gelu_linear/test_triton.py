"""Values of gelu_linear: the interpreted kernels and the torch code against formulas in float64."""

import math
from typing import Any

import pytest
import torch

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Case, Inputs
from mvlm_kernels.gelu_linear.cases import case
from support.kernels.check import check, results

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def of(
    rows: int, width: int, out: int, dtype: torch.dtype = FP32, parameters: torch.dtype = FP32, bias: bool = True,
    h_bias: bool = True,
) -> Case:  # fmt: skip
    biases: dict[str, Any] = {"bias": parameters if bias else None, "h_bias": parameters if h_bias else None}
    return case(f"{rows}x{width}", (rows, width), out, dtype, parameters, **biases)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("types", [(BF16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64)], ids=str)
def test_types_and_biases(types: Any, biases: Any):
    check(of(11, 70, 5, *types, *biases))


def test_several_slices_of_columns_and_tiles_of_rows(monkeypatch):
    """Four programs along the rows, for thirteen tiles; three slices of columns."""
    check(of(3, 600, 4))
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(of(101, 40, 4))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times 0
def test_gelu_and_derivative_in_float32_are_right_in_both_tails():
    """Bounds of the largest errors: those of erf in float32, and in the left tail a bound of the relative one."""
    x = torch.cat([torch.linspace(-14, 14, 20_001), torch.tensor([-math.inf, math.inf, math.nan])])
    wide = x[:-3].double()
    below = 0.5 * torch.special.erfc(-wide / math.sqrt(2))
    slope = below + wide * torch.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    with use_backend("triton"):
        gelu = torch.ops.mvlm_kernels.gelu(x[None], None)[0]
        derivative, again, _ = torch.ops.mvlm_kernels.gelu_backward(torch.ones(1, len(x)), x[None], None, True)
    assert torch.equal(again[0].nan_to_num(7), gelu.nan_to_num(7))
    assert torch.equal(gelu[-3:].nan_to_num(7), torch.tensor([7, math.inf, 7]).nan_to_num(7))  # as torch's
    error = (gelu[:-3].double() - wide * below).abs()
    assert error.max() < 4.5e-7
    assert (derivative[0, :-3].double() - slope).abs().max() < 1.5e-7
    tail = (wide > -6) & (wide < -0.5)
    assert (error / (wide * below).abs())[tail].max() < 2e-5


def test_repeats_and_strides_give_the_same_bits():
    made, grads = of(20, 40, 6, BF16), [torch.randn(20, 6, generator=torch.Generator().manual_seed(7))]
    inputs = made.make("cpu")
    strided = Inputs({name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.leaves.items()}, inputs.fixed)
    with use_backend("triton"):
        wanted, *others = (results(made.ours, given, grads) for given in (inputs, inputs, strided))
    for again in others:
        assert all(torch.equal(again[name], x) for name, x in wanted.items())
