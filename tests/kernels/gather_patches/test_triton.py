"""Values of gather_patches: the interpreted kernels against windows of the images in float64."""

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.case import LAYOUTS, MEAN, STD, Draw
from mvlm_kernels.gather_patches import gather_patches, reference
from mvlm_kernels.gather_patches.cases import case, oracle
from support.kernels.check import SETTINGS, check
from triton_proof.allocations import guarded

ANY_MEAN, ANY_STD = [*MEAN, 0.5, 0.25], [*STD, 0.5, 0.125]


@pytest.mark.parametrize("patch, channels, grid", [(14, 3, (2, 2)), (16, 3, (1, 2)), (1, 5, (3, 2)), (32, 1, (1, 1))])
def test_gather_kernels_for_patch_sides(patch: int, channels: int, grid: tuple[int, int]):
    values: dict[str, Any] = {"mean": ANY_MEAN[:channels], "std": ANY_STD[:channels]}
    check(case("", 1, grid, patch, None, torch.uint8, torch.bfloat16, channels=channels, **values))


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 3), st.integers(1, 4),
    st.integers(-1, 9), st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.sampled_from(LAYOUTS), st.sampled_from([torch.int32, torch.int64]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_gather_kernels_for_any_shape(
    batch: int, channels: int, patch: int, rows: int, columns: int, count: int, dtype: torch.dtype, layout: Any,
    ids: torch.dtype, with_mean: bool, with_std: bool,
):  # fmt: skip
    mean, std = ANY_MEAN[:channels] if with_mean else None, ANY_STD[:channels] if with_std else None
    options: dict[str, Any] = {"channels": channels, "layout": layout, "ids": ids, "mean": mean, "std": std}
    check(case("", batch, (rows, columns), patch, None if count < 0 else count, dtype, **options))


def test_gradients_of_repeated_patch_ids_add_up():
    images, ids = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.tensor([[5, 0, 5, 5, 0]]).expand(3, 5)
    found = []
    for function in (gather_patches, oracle):
        x = images.clone().requires_grad_()
        with use_backend("triton"):
            out = function(x, ids, 2, std=STD[:2])
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("stride", [(2**31 + 64, 4, 2, 1), (16, 2**30 + 8, 2, 1), (16, 8, 2**31 + 8, 1)], ids=str)
def test_gather_kernel_reads_strides_past_31_bits(stride):
    size = (2, 3, 2, 2)
    # Untouched pages are never allocated: this buffer costs address space, not memory.
    storage = torch.empty(1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)), dtype=torch.uint8)
    images = storage.as_strided(size, stride)
    images.copy_(Draw("cpu").images(*size, torch.uint8))
    with use_backend("triton"):
        out = gather_patches(images, None, 1)
    torch.testing.assert_close(out.double(), oracle(images, None, 1), rtol=1e-6, atol=0)


def test_bad_patch_id_on_a_gpu_reads_nothing_and_gives_nan():
    """Ids are not checked there by default, so the launchers are called as the op calls them on a GPU."""
    launchers = importlib.import_module("mvlm_kernels.gather_patches.triton")
    images = guarded(torch.rand(1, 2, 4, 4))
    ids = torch.tensor([[1, -1, 4, 2**31 - 1, 3]])
    out = launchers.gather_patches(images, ids, 2, None, None, torch.float32)
    assert out[0, 1:4].isnan().all()
    torch.testing.assert_close(out[:, [0, 4]], gather_patches(images, ids[:, [0, 4]], 2))
    grad = reference.gather_patches_backward(torch.ones_like(out), images, ids, 2, None)
    assert grad[0, :, :2, :2].eq(0).all()
    assert grad[0, :, 2:, 2:].eq(1).all()


def test_gather_kernel_reads_means_of_any_stride():
    images, table = Draw("cpu").images(2, 3, 8, 8, torch.uint8), torch.tensor([MEAN, STD]).T.contiguous()
    wanted = gather_patches(images, None, 4, mean=MEAN, std=STD)
    with use_backend("triton"):
        torch.testing.assert_close(gather_patches(images, None, 4, mean=table[:, 0], std=table[:, 1]), wanted)


def test_gathered_patches_never_share_the_images_memory():
    images = torch.rand(2, 3, 4, 4)
    for patch in (1, 4):
        patches = gather_patches(images, None, patch)
        assert patches.is_contiguous()
        assert patches.data_ptr() != images.data_ptr()
