"""What multiprocessors hold: CUDA C++ programming guide, technical specifications per compute capability."""

import pytest

from mvlm_kernels.hardware import multiprocessor


@pytest.mark.parametrize(
    "arch, warps, shared",
    [(90, 64, 228), (100, 64, 228), (103, 64, 228), (120, 48, 100), (121, 48, 100), (87, 48, 100)],
)
def test_a_multiprocessor_by_compute_capability(arch, warps, shared):
    """Of 8.7 there is no row: it is taken for the smallest."""
    assert multiprocessor(arch)[:3:2] == (warps, shared)
