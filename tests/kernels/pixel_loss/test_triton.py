"""Values of masked_pixel_loss: the interpreted kernels against formulas in float64."""

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.case import LAYOUTS, MEAN
from mvlm_kernels.pixel_loss import masked_pixel_loss
from mvlm_kernels.pixel_loss.cases import KINDS, case
from support.kernels.check import SETTINGS, check
from triton_proof.allocations import guarded

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 5]), st.integers(1, 2), st.integers(1, 3),
    st.integers(-1, 7), st.sampled_from([torch.uint8, *FLOATS]), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS),
    st.sampled_from(KINDS), st.booleans(), st.sampled_from(["mean", "none"]), st.booleans(),
)  # fmt: skip
def test_masked_kernels_for_any_shape(
    batch: int, channels: int, patch: int, rows: int, columns: int, count: int, images: torch.dtype,
    dtype: torch.dtype, layout: Any, kind: str, normalize: bool, reduction: str, strided: bool,
):  # fmt: skip
    options: dict[str, Any] = {"channels": channels, "layout": layout, "kind": kind, "reduction": reduction}
    options |= {"normalize": normalize and channels * patch**2 > 1, "strided": strided, "ids": torch.int64}
    mean = [*MEAN, 0.5, 0.25][:channels]
    number = None if count < 0 else count
    check(case("", batch, (rows, columns), patch, number, images, dtype, mean=mean, std=None, **options))


def test_sums_are_those_of_more_values_than_a_tile_has():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())


def test_nan_predictions_give_nan_gradients():
    """Sign bytes have no NaN, but a loss scaler that looks for NaN in gradients must still see one."""
    images = torch.tensor([[[[0, 255], [17, 3]]]], dtype=torch.uint8)
    pred = torch.tensor([[[0.5, float("nan"), -1.0, 2.0]]])
    for backend in ("torch", "triton"):
        p = pred.clone().requires_grad_()
        with use_backend(backend):
            loss = masked_pixel_loss(p, images, None, 2)
            loss.backward()
        assert loss.isnan()
        assert p.grad is not None
        assert p.grad.isnan().tolist() == [[[False, True, False, False]]]


def test_bad_patch_id_on_a_gpu_gives_a_nan_loss():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    images, ids = guarded(torch.rand(1, 2, 4, 4)), torch.tensor([[1, -1, 4, 3]])
    pred = guarded(torch.randn(1, 4, 8))
    losses, _ = launchers.masked_pixel_loss(pred, images, ids, 2, None, None, "l1", True, False, True)
    assert losses.isnan().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scaled_gradients_of_each_patch_fit_float16(backend):
    """A loss scale of 2^16 exceeds float16, but the scaled gradients fit."""
    made, grads = case("", 2, (2, 2), 2, 4, torch.uint8, torch.float16, reduction="none"), []
    for scale in (1.0, 2.0**16):
        inputs = made.make("cpu")
        with use_backend(backend):
            (loss,) = made.forward(inputs)
        grads += torch.autograd.grad(loss, inputs.leaves["pred"], torch.full_like(loss, scale))
    assert bool(grads[1].isfinite().all())
    torch.testing.assert_close(grads[1], grads[0] * 2.0**16, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=["no patches", "no images"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_of_no_rows_is_zero_and_has_a_gradient(shape, backend, reduction):
    images, ids = torch.zeros(shape[0], 3, 4, 4, dtype=torch.uint8), torch.zeros(shape, dtype=torch.int64)
    pred = torch.zeros(*shape, 12, requires_grad=True)
    with use_backend(backend):
        loss = masked_pixel_loss(pred, images, ids, 2, kind="mse", reduction=reduction)
        loss.sum().backward()
    assert loss.shape == (() if reduction == "mean" else shape)
    assert loss.sum() == 0
    assert pred.grad is not None
