"""masked_pixel_loss and linear_pixel_loss as ops: registration, compilation, bad input, and the text of explain."""

import importlib

import pytest
import torch

from mvlm_kernels import dispatch, explain, use_backend
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
        torch.library.opcheck(ops.linear_pixel_loss.default, (*parameters, *pixels, "mse", False, False, True))


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
    assert explain(linear_pixel_loss, HIDDEN, WEIGHT, BIAS, IMAGES, IDS, 2).reasons == ("the tensors are on the CPU",)


def test_launchers_of_pixel_losses_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for name in ("triton", "linear_aot_cases"):
            for _, launch in importlib.import_module(f"mvlm_kernels.pixel_loss.{name}").aot_cases():
                launch()  # meta tensors: reading one on the host would raise
    assert {"loss_kernel", "linear_loss_kernel", "hidden_gradient_kernel", "weight_gradient_kernel"} <= set(launched)


def test_linear_loss_of_float64_images_and_narrower_hidden_states_takes_torch():
    images, hidden = torch.rand(1, 1, 4, 4, dtype=torch.float64), random((1, 4, 3), torch.bfloat16)
    weight = random((4, 3), torch.bfloat16)
    assert any(
        "float64" in reason for reason in explain(linear_pixel_loss, hidden, weight, None, images, None, 2).reasons
    )
