"""Values of gelu_linear: the interpreted kernels and the torch code against loops in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mvlm_kernels import dispatch, gelu_linear, use_backend
from support.kernels.accuracy import accurate
from support.kernels.pixel_losses import random
from triton_proof.allocations import guarded

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = "output", "dh", "dweight", "dbias", "dh_bias"


def case(rows, width, out, dtype=FP32, parameters=FP32, bias=True, h_bias=True):
    """h, weight, bias and h_bias. Values of h reach both tails of the GELU."""
    return [
        3 * random((rows, width), dtype),
        random((out, width), parameters, 1),
        random((out,), parameters, 2) if bias else None,
        random((width,), parameters, 3) if h_bias else None,
    ]


def oracle(inputs, grad):
    """Output and gradients in float64, with the GELU and its derivative value by value."""
    arrays: list[Any] = [None if t is None else t.detach().double().numpy() for t in inputs]
    h, weight, bias, h_bias = arrays
    x = h if h_bias is None else h + h_bias
    below = np.array([[0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    g = grad.double().numpy()
    dh = (g @ weight) * (below + x * density)
    found = [(x * below) @ weight.T + (0 if bias is None else bias), dh, g.T @ (x * below)]
    return [*found, None if bias is None else g.sum(0), None if h_bias is None else dh.sum(0)]


def by_op(inputs, grad, backend):
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in inputs]
    h, weight, bias, h_bias = leaves
    with use_backend(backend):
        out = gelu_linear(h, weight, bias, h_bias=h_bias)
        out.backward(grad)
    return [out.detach(), *(None if t is None else t.grad for t in leaves)]


def check(inputs):
    grad = random((len(inputs[0]), len(inputs[1])), inputs[0].dtype, 4)
    wanted = oracle(inputs, grad)
    inner: list[Any] = [None if t is None else guarded(t) for t in inputs]
    by_torch, by_kernel = (by_op(inner, guarded(grad), backend) for backend in ("torch", "triton"))
    half = inputs[0].dtype.itemsize == 2  # weights and products are then rounded to 16 bits
    for name, want, slow, fast in zip(NAMES, wanted, by_torch, by_kernel, strict=True):
        assert (want is None) == (slow is None) == (fast is None), name
        if want is None:
            continue
        want = torch.from_numpy(want)
        accurate(f"{name} by torch", slow, slow, want, rms=2e-2 if half else None, terms=50)
        accurate(f"{name} by the kernels", fast, slow, want, rms=2e-2 if half else None, terms=50)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("types", [(BF16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64)], ids=str)
def test_types_and_biases(types, biases):
    check(case(11, 70, 5, *types, *biases))


def test_several_slices_of_columns_and_tiles_of_rows(monkeypatch):
    """Four programs along the rows, for thirteen tiles; three slices of columns."""
    check(case(3, 600, 4))
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(case(101, 40, 4))


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
    inputs, grad = case(20, 40, 6, BF16), random((20, 6), BF16, 7)
    wanted = by_op(inputs, grad, "triton")
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in inputs]
    for again in (by_op(inputs, grad, "triton"), by_op(strided, grad, "triton")):
        for a, b in zip(again, wanted, strict=True):
            assert torch.equal(a, b)
