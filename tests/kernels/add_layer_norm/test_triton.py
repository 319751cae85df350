"""Values of add_layer_norm: the interpreted kernels and the torch code against loops in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import add_layer_norm, dispatch, use_backend
from support.kernels.norms import by_op, case, check
from support.kernels.patches import SETTINGS
from support.kernels.pixel_losses import random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    "types",
    [
        (FP32, BF16, FP32),
        (FP32, FP16, FP32),
        (FP32, FP32, FP32),
        (BF16, BF16, BF16),
        (BF16, BF16, FP32),
        (FP32, None, FP32),
        (FP64, FP64, FP64),
    ],
    ids=str,
)
def test_types(types, post_norm):
    check(case(9, 96, *types), post_norm, out_dtype=BF16 if types[0] != FP64 else FP64)


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 7, 96, 192, 200, 384, 768, 1000])
def test_widths(width):
    check(case(5, width))
    check(case(5, width, bias=False), post_norm=True)


@pytest.mark.slow
@SETTINGS
@given(st.integers(1, 40), st.integers(5, 130), st.booleans(), st.booleans(), st.sampled_from([BF16, FP32, None]))
def test_any_shape(rows, width, post_norm, bias, y_dtype):
    check(case(rows, width, y_dtype=y_dtype, bias=bias), post_norm)


@pytest.mark.slow
def test_programs_walk_over_many_tiles(monkeypatch):
    """Two programs for eleven tiles."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(case(41, 768))
    check(case(41, 192), post_norm=True)


@pytest.mark.slow
@pytest.mark.parametrize("used", ["stream", "normalised"])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_output_is_used(backend, post_norm, used):
    """The gradient is that of the other one's gradient being zero."""
    inputs, found = case(6, 12, FP64, BF16, FP64), []
    for both in (False, True):
        x, y, y_bias, weight, bias = (t.detach().requires_grad_() for t in inputs)
        with use_backend(backend):
            stream, n = add_layer_norm(x, y, weight, bias, y_bias=y_bias, post_norm=post_norm)
            one, other = (stream, n) if used == "stream" else (n, stream)
            ((one.double() ** 2).sum() + (0 * other.double().sum() if both else 0)).backward()
        found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in (x, y, y_bias, weight, bias)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_rows_of_any_strides_and_repeats_give_the_same_bits():
    inputs = case(12, 96)
    grads = [random((12, 96), FP32, 7), random((12, 96), BF16, 8)]
    wanted = by_op(inputs, grads, False, "triton", BF16)
    strided = [None if t is None else torch.stack([t, t], dim=-1)[..., 0] for t in inputs]
    for again in (by_op(inputs, grads, False, "triton", BF16), by_op(strided, grads, False, "triton", BF16)):
        for a, b in zip(again, wanted, strict=True):
            assert torch.equal(a, b)


def test_a_single_row_without_other_dimensions():
    x, y, weight, bias, y_bias = made = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    flat = add_layer_norm(x, y, weight, bias, y_bias=y_bias)
    rows = add_layer_norm(x[None], y[None], weight, bias, y_bias=y_bias)
    for a, b in zip(flat, rows, strict=True):
        wanted = torch.autograd.grad(b.square().sum(), made, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(a.square().sum(), made, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
