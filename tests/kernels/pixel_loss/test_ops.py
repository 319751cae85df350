"""masked_pixel_loss and linear_pixel_loss as ops: registration, compilation, bad input, and the text of explain."""

import importlib

import pytest
import torch

from mvlm_kernels import dispatch, explain, use_backend
from mvlm_kernels.aot_cases import CASES
from mvlm_kernels.dispatch import ON_CPU
from mvlm_kernels.pixel_loss import linear_pixel_loss, masked_pixel_loss
from support.kernels.patches import MEAN, STD, make_ids, make_images
from support.kernels.pixel_losses import random


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pixel_losses_pass_opcheck(backend):
    images, ids = make_images((1, 3, 4, 4), torch.uint8, "channels_last"), make_ids(1, 3, 4)
    pixels = (images, ids, 2, torch.tensor(MEAN[:3]), torch.tensor(STD[:3]))
    pred = random((1, 3, 12), torch.float32).requires_grad_()
    parameters = [random(s, torch.float32, i).requires_grad_() for i, s in enumerate([(1, 3, 5), (12, 5), (12,)])]
    with use_backend(backend):
        ops = torch.ops.mvlm_kernels
        torch.library.opcheck(ops.masked_pixel_loss.default, (pred, *pixels, "l1", True, True, True))
        torch.library.opcheck(ops.linear_pixel_loss.default, (*parameters, *pixels, "l1", False, False, True))
        # The slopes of mse are floating outputs. Their gradient would be a second derivative, which is refused, and the
        # last check of opcheck asks for it.
        mse = (*pixels, "mse", False, False, True)
        forward = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ops.linear_pixel_loss.default, (*parameters, *mse), test_utils=forward)
        constants = [p.detach() for p in parameters]
        torch.library.opcheck(ops.linear_pixel_loss.default, (*constants, *mse))


@pytest.mark.slow
@pytest.mark.plain_empty
def test_pixel_losses_compile_without_a_break_for_any_size():
    def step(hidden, weight, bias, images, ids):
        pred = torch.nn.functional.linear(hidden, weight, bias)
        return masked_pixel_loss(pred, images, ids, 2, mean=MEAN[:3]) + linear_pixel_loss(
            hidden, weight, bias, images, ids, 2, mean=MEAN[:3], normalize_target=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, count in ((2, 3), (3, 4)):
        images, ids = make_images((batch, 3, 4, 4), torch.uint8, "contiguous"), make_ids(batch, count, 4)
        parameters = [
            random(s, torch.float32, i).requires_grad_() for i, s in enumerate([(batch, count, 5), (12, 5), (12,)])
        ]
        with use_backend("triton"):
            hidden, weight, bias = parameters
            got, want = (f(hidden, weight, bias, images, ids) for f in (compiled, step))
            torch.testing.assert_close(got, want)
            grads = [torch.autograd.grad(x, parameters) for x in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


IMAGES, IDS = torch.zeros(2, 3, 4, 6), torch.zeros(2, 1, dtype=torch.int64)
PRED, HIDDEN, WEIGHT, BIAS = torch.zeros(2, 1, 12), torch.zeros(2, 1, 5), torch.zeros(12, 5), torch.zeros(12)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((PRED[0], IMAGES, IDS, 2), {}, r"pred must have shape \(B, K, features\) with B, K = \(2, 1\), got \(1, 12\)"),
        ((PRED, IMAGES, None, 2), {}, r"pred must have shape .* \(2, 6\), got \(2, 1, 12\)"),
        ((PRED[..., :9], IMAGES, IDS, 2), {}, r"pred must have 12 = C\*P\*P features, got shape \(2, 1, 9\)"),
        ((PRED.int(), IMAGES, IDS, 2), {}, "pred must be float16, .*, got torch.int32"),
        ((PRED.to("meta"), IMAGES, IDS, 2), {}, "pred must be on the device"),
        ((PRED, IMAGES, IDS + 6, 2), {}, r"patch_ids must be in \[0, 6\), got values in \[6, 6\]"),
        ((PRED, IMAGES, IDS, 2), {"kind": "l2"}, "kind must be .*, got 'l2'"),
        ((PRED, IMAGES, IDS, 2), {"reduction": "sum"}, "reduction must be .*, got 'sum'"),
        ((torch.zeros(2, 1, 1), IMAGES[:, :1], IDS, 1), {"normalize_target": True}, "normalize_target must be False"),
        ((PRED, IMAGES, IDS, 2), {"mean": (0.5,)}, "mean must have one value for each of 3 channels, got 1"),
    ],
)  # fmt: skip
def test_bad_input_of_masked_pixel_loss_says_what_was_wanted(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        masked_pixel_loss(*args, **kwargs)


@pytest.mark.parametrize(
    "hidden, weight, bias, message",
    [
        (HIDDEN[0], WEIGHT, BIAS, r"hidden must have shape .*, got \(1, 5\)"),
        (HIDDEN, WEIGHT[:, :4], BIAS, r"weight must have shape \(C\*P\*P, D\) = \(12, 5\), got \(12, 4\)"),
        (HIDDEN, WEIGHT.bfloat16(), BIAS, "weight must be torch.float32 like hidden, or float32, got torch.bfloat16"),
        (HIDDEN, WEIGHT, BIAS[:3], r"bias must have shape \(C\*P\*P,\) = \(12,\), got \(3,\)"),
        (HIDDEN, WEIGHT, BIAS.half(), "bias must be torch.float32 like weight, got torch.float16"),
    ],
)
def test_bad_input_of_linear_pixel_loss_says_what_was_wanted(hidden, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear_pixel_loss(hidden, weight, bias, IMAGES, IDS, 2)


def test_explain_names_reasons_of_pixel_losses():
    assert explain(masked_pixel_loss, PRED, IMAGES, IDS, 2).backend == "torch"
    assert explain(linear_pixel_loss, HIDDEN, WEIGHT, BIAS, IMAGES, IDS, 2).reasons == (ON_CPU,)


def test_launchers_of_pixel_losses_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for name in ("masked_pixel_loss", "linear_pixel_loss"):
            for _, launch in CASES[name]():
                launch()  # meta tensors: reading one on the host would raise
    assert set(launched) == {"loss_kernel", "sum_kernel", "scale_slope_kernel"}


def test_explain_says_that_cublas_multiplies_in_linear_pixel_loss(monkeypatch):
    monkeypatch.setattr(dispatch, "device_reasons", lambda device: ())  # as on a GPU
    found = explain(linear_pixel_loss, HIDDEN, WEIGHT, BIAS, IMAGES, IDS, 2)
    assert found.backend == "triton"
    assert "cuBLAS multiplies" in found.reasons[0]
    assert "cuBLAS" not in str(explain(masked_pixel_loss, PRED, IMAGES, IDS, 2))


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


def test_chunks_of_linear_pixel_loss_cover_the_batch_and_are_bounded():
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    for batch in (0, 1, 2, 17, 256, 1000):
        for size in (0, 1, 116 * 768 * 4, linear.CHUNK_BYTES // 3, linear.CHUNK_BYTES, 5 * linear.CHUNK_BYTES):
            found = list(linear.chunks(batch, size))
            assert [i for part in found for i in range(part.start, part.stop)] == list(range(batch))
            assert all(part.start % 16 == 0 for part in found)
            images = max((part.stop - part.start for part in found), default=0)
            assert images <= 16 or images * size <= linear.CHUNK_BYTES
    assert len(list(linear.chunks(256, 116 * 768 * 4))) == 4


def test_gradient_of_a_float16_weight_does_not_overflow():
    """The sum of its 81,920 products is above 65,504 before the mean is taken."""
    hidden = torch.full((2048, 40, 1), 1.0).half()
    images = torch.zeros(2048, 1, 40, 1, dtype=torch.uint8)
    weight = torch.full((1, 1), 2.0).half().requires_grad_()
    with use_backend("torch"):
        linear_pixel_loss(hidden, weight, None, images, None, 1).backward()
    assert weight.grad is not None
    assert weight.grad.item() == 1
