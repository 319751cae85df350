"""masked_pixel_loss and linear_pixel_loss: interpreted kernels against loops in float64, the op boundary, bad input."""

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from kernel_checks import guarded
from patch_cases import (
    LAYOUTS,
    MEAN,
    SETTINGS,
    STD,
    accurate,
    assert_caught,
    losses_oracle,
    make_ids,
    make_images,
    patches_oracle,
)

from mvlm_kernels import dispatch, explain, use_backend
from mvlm_kernels.pixel_loss import linear_pixel_loss, masked_pixel_loss

KINDS = ("l1", "mse", "smooth_l1")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(shape, dtype, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def incoming(shape, reduction):
    """A gradient of the loss that is neither 1 nor the same for all patches."""
    return torch.tensor(1.7) if reduction == "mean" else random(shape, torch.float32, seed=9)


def pred_gradient_oracle(slope, grad, reduction):
    """(B, K, F) float64 of the predictions."""
    batch, count, features = slope.shape
    if reduction == "mean":
        return slope * float(grad) / max(1, batch * count * features)
    return slope * grad.double().numpy()[:, :, None] / features


def check_masked(
    pred, images, ids, patch, mean=None, std=None, kind: Any = "l1", normalize=False, reduction: Any = "mean",
    device="cpu",
):  # fmt: skip
    results = {}
    grad = incoming(pred.shape[:2], reduction)
    for backend in ("triton", "torch"):
        at = device if backend == "triton" else "cpu"
        p = guarded(pred, at).requires_grad_()
        with use_backend(backend):
            loss = masked_pixel_loss(
                p, guarded(images, at), None if ids is None else guarded(ids, at), patch, mean=mean, std=std, kind=kind,
                normalize_target=normalize, reduction=reduction,
            )  # fmt: skip
            loss.backward(grad.to(loss))
        assert p.grad is not None
        results[backend] = loss.detach().cpu(), p.grad.cpu()
    losses, slope = losses_oracle(
        pred.detach().double().numpy(), patches_oracle(images, ids, patch, mean, std), kind, normalize
    )
    wanted = losses.sum() / max(1, losses.size) if reduction == "mean" else losses
    (loss, p_grad), (torch_loss, torch_grad) = results["triton"], results["torch"]
    accurate("loss", loss, torch_loss, torch.as_tensor(wanted), 4.0)
    wanted_grad = torch.from_numpy(pred_gradient_oracle(slope, grad, reduction))
    # Slopes are differences of numbers of about 4 (a normalised target), scaled by what the loss was divided by.
    terms = 8.0 * float(grad.abs().max()) / pred.shape[2] if grad.numel() else 0.0
    accurate("pred gradient", p_grad, torch_grad, wanted_grad, 0 if kind == "l1" else terms)


def check_linear(
    hidden, weight, bias, images, ids, patch, mean=None, std=None, kind: Any = "l1", normalize=False,
    reduction: Any = "mean", device="cpu",
):  # fmt: skip
    results = {}
    parameters = [hidden, weight] + ([] if bias is None else [bias])
    grad = incoming(hidden.shape[:2], reduction)
    for backend in ("triton", "torch"):
        at = device if backend == "triton" else "cpu"
        x = [guarded(p, at).requires_grad_() for p in parameters]
        with use_backend(backend):
            loss = linear_pixel_loss(
                x[0], x[1], None if bias is None else x[2], guarded(images, at),
                None if ids is None else guarded(ids, at), patch, mean=mean, std=std, kind=kind,
                normalize_target=normalize, reduction=reduction,
            )  # fmt: skip
            loss.backward(grad.to(loss))
        results[backend] = [loss.detach().cpu(), *(p.grad.cpu() for p in x if p.grad is not None)]
    h, w = hidden.double().numpy(), weight.double().numpy()
    pred = h @ w.T + (0 if bias is None else bias.double().numpy())
    losses, slope = losses_oracle(pred, patches_oracle(images, ids, patch, mean, std), kind, normalize)
    g = pred_gradient_oracle(slope, grad, reduction).reshape(-1, w.shape[0])
    wanted = [
        losses.sum() / max(1, losses.size) if reduction == "mean" else losses,
        (g @ w).reshape(h.shape),
        g.T @ h.reshape(-1, h.shape[2]),
        g.sum(axis=0),
    ]
    # The loss is in float32 whatever the type of its operands, and it comes out of their products.
    bounds = [2e-3 if hidden.dtype in (torch.bfloat16, torch.float16) else None, None, None, None]
    names = "loss", "hidden gradient", "weight gradient", "bias gradient"
    for name, got, same, want, bound in zip(
        names, results["triton"], results["torch"], wanted, bounds, strict=bias is not None
    ):
        accurate(name, got, same, torch.as_tensor(want), 4.0 if name == "loss" else 0.0, bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_kinds(kind, normalize, reduction):
    images = make_images((2, 3, 14, 21), torch.uint8, "channels_last")
    ids = make_ids(2, 4, 6, torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        check_masked(random((2, 4, 147), dtype), images, ids, 7, MEAN[:3], STD[:3], kind, normalize, reduction)


@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 5]), st.integers(1, 2), st.integers(1, 3),
    st.integers(-1, 7), st.sampled_from([torch.uint8, *FLOATS]), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS),
    st.sampled_from(KINDS), st.booleans(), st.sampled_from(["mean", "none"]), st.booleans(),
)  # fmt: skip
def test_masked_any_shape(
    batch, channels, patch, rows, columns, count, images_dtype, dtype, layout, kind, normalize, reduction, strided
):
    images = make_images((batch, channels, rows * patch, columns * patch), images_dtype, layout)
    ids = None if count < 0 else make_ids(batch, count, rows * columns)
    features = channels * patch**2
    pred = random((batch, rows * columns if count < 0 else count, features * (1 + strided)), dtype)[..., :: 1 + strided]
    check_masked(pred, images, ids, patch, MEAN[:channels], None, kind, normalize and features > 1, reduction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_tiles_and_parts(kind, dtype, monkeypatch):
    """More rows, pixels and width than a tile, none a multiple of it, and the rows summed in several parts."""
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    monkeypatch.setattr(linear, "PARTIAL_ROWS", 30)
    images = make_images((5, 3, 14, 21), torch.uint8, "contiguous")
    ids = make_ids(5, 19, 6)
    hidden, weight, bias = random((5, 19, 67), dtype), random((147, 67), dtype, 1, 0.1), random((147,), dtype, 2)
    for normalize, reduction in ((False, "mean"), (True, "none")):
        check_linear(hidden, weight, bias, images, ids, 7, MEAN[:3], STD[:3], kind, normalize, reduction)


@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(-1, 5),
    st.sampled_from([1, 5, 16, 33]), st.sampled_from(FLOATS), st.sampled_from(LAYOUTS), st.sampled_from(KINDS),
    st.booleans(), st.sampled_from(["mean", "none"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear_any_shape(
    batch, channels, patch, count, width, dtype, layout, kind, normalize, reduction, with_bias, strided
):
    images = make_images((batch, channels, 2 * patch, 2 * patch), torch.uint8, layout)
    ids = None if count < 0 else make_ids(batch, count, 4)
    features = channels * patch**2
    hidden = random((batch, 4 if count < 0 else count, width * (1 + strided)), dtype)[..., :: 1 + strided]
    weight = random((width, features), dtype, 1, 0.3).T if strided else random((features, width), dtype, 1, 0.3)
    bias = random((features,), dtype, 2) if with_bias else None
    check_linear(hidden, weight, bias, images, ids, patch, None, None, kind, normalize and features > 1, reduction)


def test_float32_weights_beside_bfloat16_activations_and_autocast():
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_through_the_kernels(kind, reduction):
    images, ids = make_images((1, 2, 4, 4), torch.uint8, "contiguous"), torch.tensor([[3, 0]])
    options = {"kind": kind, "normalize_target": reduction == "mean", "reduction": reduction}
    pred = random((1, 2, 8), torch.float64).requires_grad_()
    parameters = [random(s, torch.float64, i).requires_grad_() for i, s in enumerate([(1, 2, 3), (8, 3), (8,)])]
    with use_backend("triton"):
        assert torch.autograd.gradcheck(lambda p: masked_pixel_loss(p, images, ids, 2, **options), pred)
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_pixel_loss(h, w, b, images, ids, 2, **options), parameters
        )


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(8)], ids=str)
def test_only_what_is_asked_for(needs):
    images, ids = make_images((1, 1, 4, 4), torch.uint8, "contiguous"), make_ids(1, 3, 4)
    parameters = [random(s, torch.float32, i) for i, s in enumerate([(1, 3, 5), (4, 5), (4,)])]
    with use_backend("triton"):
        full = [p.clone().requires_grad_() for p in parameters]
        wanted = torch.autograd.grad(linear_pixel_loss(full[0], full[1], full[2], images, ids, 2), full)
        some = [p.clone().requires_grad_(need) for p, need in zip(parameters, needs, strict=True)]
        loss = linear_pixel_loss(some[0], some[1], some[2], images, ids, 2)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
    for p, want, need in zip(some, wanted, needs, strict=True):
        assert (p.grad is not None) == need
        assert p.grad is None or torch.equal(p.grad, want)


def test_nan_predictions_give_nan_gradients():
    """A sign byte has no NaN of its own; a loss scaler that looks for NaN in gradients must still see it."""
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


def test_no_patches_is_no_loss():
    images = make_images((2, 3, 4, 4), torch.uint8, "contiguous")
    ids = torch.empty(2, 0, dtype=torch.int64)
    for backend in ("torch", "triton"):
        hidden, weight = torch.zeros(2, 0, 5, requires_grad=True), torch.zeros(12, 5, requires_grad=True)
        pred = torch.zeros(2, 0, 12, requires_grad=True)
        with use_backend(backend):
            loss = linear_pixel_loss(hidden, weight, None, images, ids, 2) + masked_pixel_loss(pred, images, ids, 2)
            loss.backward()
        assert loss.item() == 0
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros(12, 5))


def test_a_bad_id_on_a_gpu_reads_nothing_and_is_loud():
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


def test_two_runs_agree_bit_for_bit(monkeypatch):
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    monkeypatch.setattr(linear, "PARTIAL_ROWS", 2)
    images, ids = make_images((2, 3, 4, 4), torch.uint8, "contiguous"), make_ids(2, 4, 4)
    parameters = [random(s, torch.float32, i).requires_grad_() for i, s in enumerate([(2, 4, 9), (12, 9), (12,)])]
    with use_backend("triton"):
        runs = []
        for _ in range(2):
            loss = linear_pixel_loss(parameters[0], parameters[1], parameters[2], images, ids, 2, kind="mse")
            runs.append((loss, *torch.autograd.grad(loss, parameters)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    images, ids = make_images((1, 3, 4, 4), torch.uint8, "channels_last"), make_ids(1, 3, 4)
    pixels = (images, ids, 2, torch.tensor(MEAN[:3]), torch.tensor(STD[:3]))
    pred = random((1, 3, 12), torch.float32).requires_grad_()
    parameters = [random(s, torch.float32, i).requires_grad_() for i, s in enumerate([(1, 3, 5), (12, 5), (12,)])]
    with use_backend(backend):
        ops = torch.ops.mvlm_kernels
        torch.library.opcheck(ops.masked_pixel_loss.default, (pred, *pixels, "l1", True, True, True))
        torch.library.opcheck(ops.linear_pixel_loss.default, (*parameters, *pixels, "mse", False, False, True))


@pytest.mark.plain_empty
def test_compiles_without_a_break_for_any_size():
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
def test_bad_input_says_what_was_wanted(args, kwargs, message):
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
def test_bad_parameters_say_what_was_wanted(hidden, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear_pixel_loss(hidden, weight, bias, IMAGES, IDS, 2)


def test_explain():
    assert explain(masked_pixel_loss, PRED, IMAGES, IDS, 2).backend == "torch"
    assert explain(linear_pixel_loss, HIDDEN, WEIGHT, BIAS, IMAGES, IDS, 2).reasons == ("the tensors are on the CPU",)


def test_launchers_never_look_at_values():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for name in ("triton", "linear"):
            for _, launch in importlib.import_module(f"mvlm_kernels.pixel_loss.{name}").aot_cases():
                launch()  # meta tensors: reading one on the host would raise
    assert {"loss_kernel", "linear_loss_kernel", "hidden_gradient_kernel", "weight_gradient_kernel"} <= set(launched)


MASKED_MUTANTS = [
    ("tl.where(inside, loss, 0.0)", "loss"),
    ("tl.where(size < 1, difference, sign)", "difference"),
    ("(1.0 / (F - 1))", "(1.0 / F)"),
    ("tl.where(inside, x - center, 0.0)", "x - center"),
    ("grad / rows_of_mean / F", "grad / F"),
    ("total += tl.load(x_ptr + i, mask=i < n, other=0.0)", "total = tl.load(x_ptr + i, mask=i < n, other=0.0)"),
    ("loss_kernel, (batch * chosen,)", "loss_kernel, (batch * chosen - 1,)"),
    ("scale_slope_kernel, (batch * chosen, ", "scale_slope_kernel, (batch * chosen - 1, "),
]
LINEAR_MUTANTS = [
    ("pred = dot(h, ", "pred = dot(h * 0 + 1, "),
    ("for start in range(0, F, BLOCK_F):", "for start in range(0, F - BLOCK_F, BLOCK_F):"),
    ("mask=(m < end)[:, None] & (f < F)[None, :]", "mask=(m < M)[:, None] & (f < F)[None, :]"),
    ("end = tl.minimum((part + 1) * rows_per_part, M)", "end = tl.minimum((part + 1) * rows_per_part - 1, M)"),
    ("(across, down, parts)", "(across, down, parts - 1)"),
    ("(part * F + f)[:, None] * D", "(0 * part * F + f)[:, None] * D"),
    ("partial_ptrs += n", "partial_ptrs += 0"),
    ("if HAS_BIAS and tl.program_id(0) == 0:", "if HAS_BIAS and tl.program_id(0) == 1:"),
    ("HAS_BIAS=bias is not None,", "HAS_BIAS=False,"),
]


def exercise_masked():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())
    images, ids = make_images((2, 3, 6, 6), torch.uint8, "contiguous"), make_ids(2, 3, 4)
    for kind, normalize in (("l1", True), ("smooth_l1", False)):
        check_masked(random((2, 3, 27), torch.float32, 3, 2.0), images, ids, 3, MEAN[:3], None, kind, normalize)


@pytest.mark.parametrize("old, new", MASKED_MUTANTS, ids=[new for _, new in MASKED_MUTANTS])
def test_a_broken_masked_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.triton", old, new, tmp_path, poison, exercise_masked)


def exercise_linear():
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    images, ids = make_images((5, 3, 14, 21), torch.uint8, "contiguous"), make_ids(5, 17, 6)
    shapes = (5, 17, 9), (147, 9), (147,)
    hidden, weight, bias = (random(shape, torch.float32, i) for i, shape in enumerate(shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "PARTIAL_ROWS", 30)
        check_linear(hidden, weight, bias, images, ids, 7)


@pytest.mark.parametrize("old, new", LINEAR_MUTANTS, ids=[new for _, new in LINEAR_MUTANTS])
def test_a_broken_linear_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.linear", old, new, tmp_path, poison, exercise_linear)


def test_the_whole_kernels_pass_what_the_broken_ones_fail():
    exercise_masked()
    exercise_linear()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_scaled_loss_of_each_patch_fits_float16(backend):
    """A loss scale of 2^16 is no float16, though the gradients that come of it are."""
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


def test_images_in_float64_beside_narrower_hidden_states_take_torch():
    images, hidden = torch.rand(1, 1, 4, 4, dtype=torch.float64), random((1, 4, 3), torch.bfloat16)
    weight = random((4, 3), torch.bfloat16)
    assert any(
        "float64" in reason for reason in explain(linear_pixel_loss, hidden, weight, None, images, None, 2).reasons
    )
