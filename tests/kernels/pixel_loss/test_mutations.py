"""Pixel-loss kernels broken on purpose: the checks must notice each one, or they prove nothing."""

import importlib

import pytest
import torch

from support.kernels.mutants import assert_caught
from support.kernels.patches import MEAN, make_ids, make_images
from support.kernels.pixel_losses import check_masked, random

MASKED_MUTANTS = [
    ("tl.where(inside, loss, 0.0)", "loss"),
    ("slope = 2 * difference", "slope = difference"),
    ("(1.0 / (F - 1))", "(1.0 / F)"),
    ("tl.where(f < F, tiles[i // BLOCK_F] - center, 0.0)", "tiles[i // BLOCK_F] - center"),
    ("tl.where(f < F, tiles[i // BLOCK_F], 0.0)", "tiles[i // BLOCK_F]"),
    ("features * max(1, batch * chosen), 0", "features, 0"),
    ("grad.flatten(), features", "grad.flatten(), 2 * features"),
    ("total += tl.load(x_ptr + i, mask=i < n, other=0.0)", "total = tl.load(x_ptr + i, mask=i < n, other=0.0)"),
    ("row_grid(*rows.shape)", "row_grid(len(rows) - 4, rows.shape[1])"),
    ("row_grid(batch * chosen,", "row_grid(batch * chosen - 4,"),
    ("stride = grad.stride(0)", "stride = 0"),
    ("tl.store(loss_ptr + tl.program_id(0), ", "tl.store(loss_ptr, "),
]


def exercise_masked():
    launchers = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    long = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launchers.total(long, 1), long.sum())
    images, ids = make_images((2, 3, 6, 6), torch.uint8, "contiguous"), make_ids(2, 3, 4)
    for kind, normalize, reduction in (("l1", True, "mean"), ("mse", False, "none")):
        pred = random((2, 3, 27), torch.float32, 3, 2.0)
        check_masked(pred, images, ids, 3, MEAN[:3], None, kind, normalize, reduction)


@pytest.mark.slow
@pytest.mark.parametrize("old, new", MASKED_MUTANTS, ids=[new for _, new in MASKED_MUTANTS])
def test_broken_masked_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.pixel_loss.triton", old, new, tmp_path, poison, exercise_masked)


@pytest.mark.slow
def test_intact_pixel_loss_kernels_pass_the_mutation_check():
    exercise_masked()
