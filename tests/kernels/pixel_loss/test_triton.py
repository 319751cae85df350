"""Values of masked_pixel_loss: the interpreted kernels against loops in float64."""

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.pixel_loss import masked_pixel_loss
from support.kernels.patches import LAYOUTS, MEAN, SETTINGS, make_ids, make_images
from support.kernels.pixel_losses import FLOATS, KINDS, check_masked, random
from triton_proof.allocations import guarded


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 5]), st.integers(1, 2), st.integers(1, 3),
    st.integers(-1, 7), st.sampled_from([torch.uint8, *FLOATS]), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS),
    st.sampled_from(KINDS), st.booleans(), st.sampled_from(["mean", "none"]), st.booleans(),
)  # fmt: skip
def test_masked_kernels_for_any_shape(
    batch, channels, patch, rows, columns, count, images_dtype, dtype, layout, kind, normalize, reduction, strided
):
    images = make_images((batch, channels, rows * patch, columns * patch), images_dtype, layout)
    ids = None if count < 0 else make_ids(batch, count, rows * columns)
    features = channels * patch**2
    pred = random((batch, rows * columns if count < 0 else count, features * (1 + strided)), dtype)[..., :: 1 + strided]
    check_masked(pred, images, ids, patch, MEAN[:channels], None, kind, normalize and features > 1, reduction)


def test_sums_are_those_of_more_values_than_a_tile_has():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())


def test_nan_predictions_give_nan_gradients():
    """Sign bytes have no NaN, but a loss scaler that looks for NaN in gradients must still see one."""
    images = make_images((1, 1, 2, 2), torch.uint8, "contiguous")
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
    images, ids = guarded(make_images((1, 2, 4, 4), torch.float32, "contiguous")), torch.tensor([[1, -1, 4, 3]])
    pred = guarded(random((1, 4, 8), torch.float32))
    losses, _ = launchers.masked_pixel_loss(pred, images, ids, 2, None, None, "l1", True, False, True)
    assert losses.isnan().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scaled_gradients_of_each_patch_fit_float16(backend):
    """A loss scale of 2^16 exceeds float16, but the scaled gradients fit."""
    images, ids = make_images((2, 3, 4, 4), torch.uint8, "contiguous"), make_ids(2, 4, 4)
    grads = []
    for scale in (1.0, 2.0**16):
        pred = random((2, 4, 12), torch.float16).requires_grad_()
        with use_backend(backend):
            loss = masked_pixel_loss(pred, images, ids, 2, reduction="none")
        grads += torch.autograd.grad(loss, pred, torch.full_like(loss, scale))
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
