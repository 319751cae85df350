"""Values of masked_pixel_loss and linear_pixel_loss: the interpreted kernels against loops in float64."""

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.pixel_loss import linear_pixel_loss, masked_pixel_loss
from support.kernels.patches import LAYOUTS, MEAN, SETTINGS, STD, make_ids, make_images
from support.kernels.pixel_losses import FLOATS, KINDS, check_linear, check_masked, random
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_loss_of_several_chunks(kind, dtype, monkeypatch):
    """Five images make chunks of two, two and one. A chunk's rows are no multiple of a program's."""
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    monkeypatch.setattr(linear, "CHUNK_BYTES", 2 * 19 * 147 * 4)
    monkeypatch.setattr(linear, "CHUNK_IMAGES", 1)
    images = make_images((5, 3, 14, 21), torch.uint8, "contiguous")
    ids = make_ids(5, 19, 6)
    hidden, weight, bias = random((5, 19, 67), dtype), random((147, 67), dtype, 1, 0.1), random((147,), dtype, 2)
    for normalize, reduction in ((False, "mean"), (True, "none")):
        check_linear(hidden, weight, bias, images, ids, 7, MEAN[:3], STD[:3], kind, normalize, reduction)


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(-1, 5),
    st.sampled_from([1, 5, 16, 33]), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS), st.sampled_from(KINDS),
    st.booleans(), st.sampled_from(["mean", "none"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear_kernels_for_any_shape(
    batch, channels, patch, count, width, dtype, layout, kind, normalize, reduction, with_bias, strided
):
    images = make_images((batch, channels, 2 * patch, 2 * patch), torch.uint8, layout)
    ids = None if count < 0 else make_ids(batch, count, 4)
    features = channels * patch**2
    hidden = random((batch, 4 if count < 0 else count, width * (1 + strided)), dtype)[..., :: 1 + strided]
    weight = random((width, features), dtype, 1, 0.3).T if strided else random((features, width), dtype, 1, 0.3)
    bias = random((features,), dtype, 2) if with_bias else None
    check_linear(hidden, weight, bias, images, ids, patch, None, None, kind, normalize and features > 1, reduction)


def test_linear_loss_takes_float32_weights_under_bfloat16_autocast():
    images, ids = make_images((2, 3, 4, 4), torch.uint8, "contiguous"), make_ids(2, 3, 4)
    hidden = random((2, 3, 24), torch.float32).requires_grad_()
    weight, bias = random((12, 24), torch.float32, 1).requires_grad_(), random((12,), torch.float32, 2).requires_grad_()
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        loss = linear_pixel_loss(hidden, weight, bias, images, ids, 2)
        pred = torch.nn.functional.linear(hidden, weight, bias)
        composed = masked_pixel_loss(pred, images, ids, 2)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    wanted = torch.autograd.grad(composed, (hidden, weight, bias))
    torch.testing.assert_close(loss, composed, rtol=4e-3, atol=0)
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)


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
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    images, ids = guarded(make_images((1, 2, 4, 4), torch.float32, "contiguous")), torch.tensor([[1, -1, 4, 3]])
    pred, weight = guarded(random((1, 4, 8), torch.float32)), torch.eye(8)
    fused = linear.linear_pixel_loss(pred, weight, None, images, ids, 2, None, None, "l1", True, False, True)[0]
    for losses in (
        launchers.masked_pixel_loss(pred, images, ids, 2, None, None, "l1", True, False, True)[0],
        fused,
    ):
        assert losses.isnan().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scaled_gradients_of_each_patch_fit_float16(backend):
    """A loss scale of 2^16 exceeds float16, but the scaled gradients fit."""
    images, ids = make_images((2, 3, 4, 4), torch.uint8, "contiguous"), make_ids(2, 4, 4)
    hidden, weight = random((2, 4, 9), torch.float16, scale=0.1), random((12, 9), torch.float16, 1, 0.1)
    grads = []
    for scale in (1.0, 2.0**16):
        h, w = hidden.clone().requires_grad_(), weight.float().requires_grad_()
        with use_backend(backend):
            loss = linear_pixel_loss(h, w, None, images, ids, 2, reduction="none")
            grads.append(torch.autograd.grad(loss, w, torch.full_like(loss, scale))[0])
    assert bool(grads[1].isfinite().all())
    torch.testing.assert_close(grads[1], grads[0] * 2.0**16, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_loss_of_float64_images_and_narrower_hidden_states(reduction):
    """The kernel computes in float64; the product stays one of float32."""
    images, hidden = make_images((1, 1, 4, 4), torch.float64, "contiguous"), random((1, 4, 3), torch.float32)
    parameters = [hidden.requires_grad_(), random((4, 3), torch.float32, 1).requires_grad_()]
    losses = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            loss = linear_pixel_loss(parameters[0], parameters[1], None, images, None, 2, reduction=reduction)
        losses.append([loss, *torch.autograd.grad(loss.sum(), parameters)])
    assert losses[0][0].dtype == torch.float64
    for got, want in zip(*losses, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_linear_loss_keeps_the_type_of_hidden_states_under_autocast():
    """Autocast to bfloat16 would round float16 states to 8 bits."""
    images, ids = make_images((1, 3, 4, 4), torch.uint8, "contiguous"), torch.tensor([[0, 3]])
    hidden, weight = random((1, 2, 24), torch.float16), random((12, 24), torch.float16, 1)
    with use_backend("triton"):
        wanted = linear_pixel_loss(hidden, weight, None, images, ids, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear_pixel_loss(hidden, weight, None, images, ids, 2), wanted)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=["no patches", "no images"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_loss_of_no_rows_has_zero_gradients(shape, backend, reduction):
    images = torch.zeros(shape[0], 3, 4, 4, dtype=torch.uint8)
    ids = torch.zeros(shape, dtype=torch.int64)
    hidden = torch.zeros(*shape, 5, requires_grad=True)
    weight, bias = torch.ones(12, 5, requires_grad=True), torch.ones(12, requires_grad=True)
    with use_backend(backend):
        loss = linear_pixel_loss(hidden, weight, bias, images, ids, 2, kind="mse", reduction=reduction)
        loss.sum().backward()
    assert loss.shape == (() if reduction == "mean" else shape)
    for parameter in (hidden, weight, bias):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_gradient_of_a_float16_weight_does_not_overflow():
    """The sum of its 81,920 products is above 65,504 before the mean is taken."""
    hidden = torch.full((2048, 40, 1), 1.0).half()
    images = torch.zeros(2048, 1, 40, 1, dtype=torch.uint8)
    weight = torch.full((1, 1), 2.0).half().requires_grad_()
    with use_backend("torch"):
        linear_pixel_loss(hidden, weight, None, images, None, 1).backward()
    assert weight.grad is not None
    assert weight.grad.item() == 1
