"""Values of gelu_linear: the interpreted kernels and the torch code against formulas in float64."""

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


def test_repeats_and_strides_give_the_same_bits():
    made, grads = of(20, 40, 6, BF16), [torch.randn(20, 6, generator=torch.Generator().manual_seed(7))]
    inputs = made.make("cpu")
    strided = Inputs({name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.leaves.items()}, inputs.fixed)
    with use_backend("triton"):
        wanted, *others = (results(made.ours, given, grads) for given in (inputs, inputs, strided))
    for again in others:
        assert all(torch.equal(again[name], x) for name, x in wanted.items())
