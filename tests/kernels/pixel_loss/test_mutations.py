"""Pixel-loss kernels broken on purpose: the checks must notice each one, or they prove nothing."""

import importlib

import pytest
import torch

from support.kernels.mutants import assert_caught
from support.kernels.patches import MEAN, make_ids, make_images
from support.kernels.pixel_losses import check_linear, check_masked, random

MASKED_MUTANTS = [
    ("tl.where(inside, loss, 0.0)", "loss"),
    ("tl.where(size < 1, difference, sign)", "difference"),
    ("(1.0 / (F - 1))", "(1.0 / F)"),
    ("tl.where(f < F, tiles[i // BLOCK_F] - center, 0.0)", "tiles[i // BLOCK_F] - center"),
    ("tl.where(f < F, tiles[i // BLOCK_F], 0.0)", "tiles[i // BLOCK_F]"),
    ("features * (1 if grad.ndim", "features * (2 if grad.ndim"),
    ("max(1, batch * chosen)), dtype)", "1), dtype)"),
    ("total += tl.load(x_ptr + i, mask=i < n, other=0.0)", "total = tl.load(x_ptr + i, mask=i < n, other=0.0)"),
    ("row_grid(*rows.shape)", "row_grid(len(rows) - 4, rows.shape[1])"),
    ("row_grid(rows, slope", "row_grid(rows - 4, slope"),
    ("stride = grad.stride(0)", "stride = 0"),
    ("tl.store(loss_ptr + tl.program_id(0), ", "tl.store(loss_ptr, "),
]
LINEAR_MUTANTS = [
    ("min(start + size, batch)", "min(start + size, batch - 1)"),
    ("            pred, bias, images[part]", "            pred, None, images[part]"),
    ("else patch_ids[part]", "else patch_ids[: part.stop - part.start]"),
    ("zip(parts, losses.flatten().split(counts), strict=True)", "zip(parts, [losses] * len(parts), strict=True)"),
    ("weight_sum += product", "weight_sum = product"),
    ("bias_sum += slopes", "bias_sum = slopes"),
    ("per_row, factor = grad / largest, largest / features", "per_row, factor = grad, largest / features"),
    ("None if per_row is None else per_row[part], 1", "None, 1"),
    ("(weight * factor).to(dtype)", "weight.to(dtype)"),
]


def exercise_masked():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())
    images, ids = make_images((2, 3, 6, 6), torch.uint8, "contiguous"), make_ids(2, 3, 4)
    for kind, normalize, reduction in (("l1", True, "mean"), ("smooth_l1", False, "none")):
        pred = random((2, 3, 27), torch.float32, 3, 2.0)
        check_masked(pred, images, ids, 3, MEAN[:3], None, kind, normalize, reduction)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", MASKED_MUTANTS, ids=[new for _, new in MASKED_MUTANTS])
def test_broken_masked_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.triton", old, new, tmp_path, poison, exercise_masked)


def exercise_linear():
    linear = importlib.import_module("mvlm_kernels.pixel_loss.linear")
    images, ids = make_images((3, 3, 4, 6), torch.uint8, "contiguous"), make_ids(3, 5, 6)
    hidden, weight, bias = (random(shape, torch.float32, i) for i, shape in enumerate([(3, 5, 7), (12, 7), (12,)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "CHUNK_BYTES", 2 * 5 * 12 * 4)  # chunks of two images and of one
        patch.setattr(linear, "CHUNK_IMAGES", 1)
        for reduction in ("mean", "none"):
            check_linear(hidden, weight, bias, images, ids, 2, reduction=reduction)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", LINEAR_MUTANTS, ids=[new for _, new in LINEAR_MUTANTS])
def test_broken_linear_loss_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.linear", old, new, tmp_path, poison, exercise_linear)


@pytest.mark.slow
def test_intact_pixel_loss_kernels_pass_the_mutation_check():
    exercise_masked()
    exercise_linear()
