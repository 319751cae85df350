"""Cases of ``masked_pixel_loss`` and ``linear_pixel_loss``: losses and gradients against loops in float64."""

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from emulator.cases import Cases
from emulator.cases.attention import TYPES
from mvlm_kernels import linear_pixel_loss, masked_pixel_loss
from mvlm_kernels.pixel_loss import linear as linear_launcher
from support.kernels import pixel_losses
from support.kernels.patches import MEAN, STD, make_ids, make_images
from support.kernels.pixel_losses import KINDS, random

BF16 = torch.bfloat16
FAST = {"masked/bf16/l1/raw/mean/p16", "linear/bf16/mse/mean/p16/D128/chunk1", "linear/bf16/mse/none/p16/D128/chunk1"}


def masked(dtype: torch.dtype, kind: str, normalize: bool, reduction: str, side: int, pixels: torch.dtype) -> None:
    images = make_images((2, 3, 2 * side, 3 * side), pixels, "channels_last")
    pred, ids = random((2, 4, 3 * side**2), dtype), make_ids(2, 4, 6, torch.int32)
    pixel_losses.check_masked(pred, images, ids, side, MEAN[:3], STD[:3], kind, normalize, reduction)


def linear(
    dtype: torch.dtype, kind: str, normalize: bool, reduction: str, side: int, width: int, images_of_a_chunk: int,
    weight_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """images_of_a_chunk: as many of the 5 images are computed at a time."""
    features, weight_dtype = 3 * side**2, weight_dtype or dtype
    images, ids = make_images((5, 3, 2 * side, 3 * side), torch.uint8, "contiguous"), make_ids(5, 19, 6)
    weight, bias = random((features, width), weight_dtype, 1, 0.1), random((features,), weight_dtype, 2)
    hidden = random((5, 19, width), dtype)
    launcher: dict[str, Any] = {"CHUNK_BYTES": 1, "CHUNK_IMAGES": images_of_a_chunk}
    in_tf32 = dtype == torch.float32 or weight_dtype != dtype
    bounds = patch.object(pixel_losses, "accurate", _close_by_rms) if in_tf32 else nullcontext()
    with patch.multiple(linear_launcher, **launcher), bounds:
        pixel_losses.check_linear(
            hidden, weight, bias, images, ids, side, MEAN[:3], STD[:3], kind, normalize, reduction
        )  # fmt: skip


def _close_by_rms(name: str, got: Tensor, same: Tensor, oracle: Tensor, terms: float = 0.0, rms: Any = None) -> None:
    """Bounds of products in TF32. The sign of an L1 slope flips where the prediction is within TF32 of the pixel."""
    error = (got.double() - oracle.double()).square().mean().sqrt() / oracle.double().square().mean().sqrt()
    assert got.isfinite().all(), f"{name}: not finite"
    assert error < (2e-3 if name == "loss" else 5e-2), f"{name}: relative RMS error {error:.2e}"


def bad_ids(dtype: torch.dtype, kind: str, normalize: bool) -> None:
    """A bad id gives NaN in its patch's loss and gradient and reads nothing. Other patches keep their bits."""
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    bad = torch.tensor([[0, -1, 5, 2], [2**31 - 1, 3, 6, -(2**31)]], dtype=torch.int32)
    is_bad = (bad < 0) | (bad > 5)
    options: Any = {"kind": kind, "normalize_target": normalize, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    pred = torch.randn(2, 4, 768).to(dtype).requires_grad_()
    hidden, weight = torch.randn(2, 4, 64).to(dtype).requires_grad_(), torch.randn(768, 64).mul(0.1).to(dtype)
    calls: list[tuple[Tensor, Any, tuple]] = [
        (pred, masked_pixel_loss, ()),
        (hidden, linear_pixel_loss, (weight, None)),
    ]
    for x, op, more in calls:
        results = []
        for ids in (bad, torch.where(is_bad, 1, bad)):
            loss = op(x, *more, images, ids, 16, reduction="none", **options)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
        for a, b in zip(*results, strict=True):
            assert a[is_bad].isnan().all(), op.__name__
            assert torch.equal(a[~is_bad], b[~is_bad]), op.__name__
            assert b.isfinite().all()


def nan_predictions(dtype: torch.dtype, kind: str) -> None:
    """A NaN stays in its patch's loss and in its pixel's gradient. An infinity gives an infinite loss."""
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    ids = torch.tensor([[0, 4, 5, 2], [1, 3, 5, 0]], dtype=torch.int32)
    pred = torch.randn(2, 4, 768).to(dtype)
    pred[0, 1, 77], pred[1, 3, 767], pred[1, 0, 3] = torch.nan, torch.nan, torch.inf
    pred.requires_grad_()
    loss = masked_pixel_loss(pred, images, ids, 16, kind=kind, reduction="none")  # pyright: ignore[reportArgumentType]
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert loss.isnan().nonzero().tolist() == [[0, 1], [1, 3]]
    assert grad.isnan().nonzero().tolist() == [[0, 1, 77], [1, 3, 767]]


def gradients_that_are_needed(reduction: Any, rows: int) -> None:
    """Each choice of what needs a gradient gives the bits of all together, also without rows."""
    images, ids = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8), torch.zeros(2, rows, dtype=torch.int32)
    inputs = torch.randn(2, rows, 64), torch.randn(768, 64).mul(0.1), torch.randn(768)
    wanted: list[Tensor | None] = []
    for needs in [(True, True, True), *itertools.product((False, True), repeat=3)]:
        h, w, b = (i.to(BF16).requires_grad_(n) for i, n in zip(inputs, needs, strict=True))
        loss = linear_pixel_loss(h, w, b, images, ids, 16, kind="smooth_l1", reduction=reduction)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.sum().backward()
        wanted = wanted or [x.grad for x in (h, w, b)]
        for x, need, want in zip((h, w, b), needs, wanted, strict=True):
            assert (x.grad is not None) == need
            assert x.grad is None or (want is not None and torch.equal(x.grad, want))


def nothing(batch: int, count: int) -> None:
    """Without a patch both losses are 0, and so are the gradients."""
    images = torch.rand(batch, 3, 32, 48)
    ids = torch.zeros(batch, count, dtype=torch.int32)
    pred, hidden = (torch.randn(batch, count, n, dtype=BF16, requires_grad=True) for n in (768, 64))
    weight, bias = (torch.randn(s, dtype=BF16, requires_grad=True) for s in ((768, 64), (768,)))
    for loss in (
        masked_pixel_loss(pred, images, ids, 16),
        linear_pixel_loss(hidden, weight, bias, images, ids, 16),
    ):
        assert loss.item() == 0
        loss.backward()
    for x in (weight.grad, bias.grad):
        assert x is not None
        assert (x == 0).all()


def cases() -> Cases:
    for (name, dtype), kind in itertools.product(TYPES.items(), KINDS):
        for normalize, reduction in itertools.product((False, True), ("mean", "none")):
            label = f"{name}/{kind}/{'normalized' if normalize else 'raw'}/{reduction}"
            for side, pixels in ((16, torch.uint8), (7, dtype), (14, torch.uint8)):
                yield f"masked/{label}/p{side}", partial(masked, dtype, kind, normalize, reduction, side, pixels)
        for normalize, reduction in ((False, "mean"), (True, "none")):
            for side, width, chunk in ((7, 67, 2), (16, 96, 16), (16, 128, 1)):
                label = f"linear/{name}/{kind}/{reduction}/p{side}/D{width}/chunk{chunk}"
                yield label, partial(linear, dtype, kind, normalize, reduction, side, width, chunk)
        for normalize in (False, True):
            label = f"bad-ids/{name}/{kind}/{'normalized' if normalize else 'raw'}"
            yield label, partial(bad_ids, dtype, kind, normalize)
        yield f"nan/{name}/{kind}", partial(nan_predictions, dtype, kind)
    fp32 = torch.float32
    yield "linear/bf16-fp32-weight/l1", partial(linear, BF16, "l1", False, "mean", 16, 96, 2, fp32)
    yield "linear/fp16-fp32-weight/mse", partial(linear, torch.float16, "mse", False, "mean", 16, 96, 16, fp32)
    yield "linear/bf16/paper-width", partial(linear, BF16, "l1", False, "mean", 16, 768, 16)
    for reduction, rows in itertools.product(("mean", "none"), (5, 0)):
        yield f"needs/{reduction}/{rows}-rows", partial(gradients_that_are_needed, reduction, rows)
    for batch, count in ((0, 4), (2, 0), (0, 0)):
        yield f"nothing/{batch}x{count}", partial(nothing, batch, count)
