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
    ("tl.where(inside, x - center, 0.0)", "x - center"),
    ("grad / rows_of_mean / F", "grad / F"),
    ("total += tl.load(x_ptr + i, mask=i < n, other=0.0)", "total = tl.load(x_ptr + i, mask=i < n, other=0.0)"),
    ("loss_kernel, (batch * chosen,)", "loss_kernel, (batch * chosen - 1,)"),
    ("scale_slope_kernel, (batch * chosen, ", "scale_slope_kernel, (batch * chosen - 1, "),
]
LINEAR_MUTANTS = [
    ("pred = dot(h, ", "pred = dot(h * 0 + 1, "),
    ("HAS_BIAS=bias is not None,", "HAS_BIAS=False,"),
]
LINEAR_BACKWARD_MUTANTS = [
    ("for start in range(0, F, BLOCK_F):", "for start in range(0, F - BLOCK_F, BLOCK_F):"),
    ("m, f, last, K,", "m, f, M, K,"),
    ("tl.program_id(0) * share", "0 * share"),
    ("end = tl.minimum((part + 1) * rows_per_part, M)", "end = tl.minimum((part + 1) * rows_per_part - 1, M)"),
    ("(across, down, parts)", "(across, down, parts - 1)"),
    ("(part.to(tl.int64) * F + f)[:, None] * D", "f[:, None] * D"),
    ("part * tl.num_programs(0) + tl.program_id(0)", "part * tl.num_programs(0)"),
]
SHARED_MUTANTS = [
    ("partial_ptrs += n", "partial_ptrs += 0"),
    ("total * widen(tl.load(grad_ptr), ACC)", "total"),
]


def exercise_masked():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())
    images, ids = make_images((2, 3, 6, 6), torch.uint8, "contiguous"), make_ids(2, 3, 4)
    for kind, normalize in (("l1", True), ("smooth_l1", False)):
        check_masked(random((2, 3, 27), torch.float32, 3, 2.0), images, ids, 3, MEAN[:3], None, kind, normalize)


@pytest.mark.parametrize("old, new", MASKED_MUTANTS, ids=[new for _, new in MASKED_MUTANTS])
def test_broken_masked_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.triton", old, new, tmp_path, poison, exercise_masked)


def exercise_linear():
    backward = importlib.import_module("mvlm_kernels.pixel_loss.linear_backward")
    images, ids = make_images((5, 3, 14, 21), torch.uint8, "contiguous"), make_ids(5, 17, 6)
    shapes = (5, 17, 67), (147, 67), (147,)  # two tiles of width, which share the rows of the bias's sums
    hidden, weight, bias = (random(shape, torch.float32, i) for i, shape in enumerate(shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "PARTIAL_ROWS", 30)
        check_linear(hidden, weight, bias, images, ids, 7)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", LINEAR_MUTANTS, ids=[new for _, new in LINEAR_MUTANTS])
def test_broken_linear_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.linear", old, new, tmp_path, poison, exercise_linear)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", LINEAR_BACKWARD_MUTANTS, ids=[new for _, new in LINEAR_BACKWARD_MUTANTS])
def test_broken_linear_gradient_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.linear_backward", old, new, tmp_path, poison, exercise_linear)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", SHARED_MUTANTS, ids=[new for _, new in SHARED_MUTANTS])
def test_broken_sum_of_partial_gradients_is_caught(old, new, tmp_path, poison):
    importers = "mvlm_kernels.pixel_loss.linear_backward", "mvlm_kernels.pixel_loss.linear"
    assert_caught("mvlm_kernels.pixel_loss.shared", old, new, tmp_path, poison, exercise_linear, importers)


@pytest.mark.slow
def test_intact_pixel_loss_kernels_pass_the_mutation_check():
    exercise_masked()
    exercise_linear()
