"""What multiprocessors hold, by the CUDA C++ programming guide, and which GPUs have a roofline."""

import pytest

from mvlm_kernels.hardware import GPUS, multiprocessor, peak_rates


@pytest.mark.parametrize(
    "arch, warps, shared",
    [(90, 64, 228), (100, 64, 228), (103, 64, 228), (120, 48, 100), (121, 48, 100), (87, 48, 100)],
)
def test_a_multiprocessor_by_compute_capability(arch, warps, shared):
    """Of 8.7 there is no row: it is taken for the smallest."""
    assert multiprocessor(arch)[:3:2] == (warps, shared)


def test_only_gpus_of_the_table_have_peak_rates() -> None:
    known = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H200": "H200"}
    known |= {"NVIDIA B200": "B200", "NVIDIA GeForce RTX 5090": "RTX 5090"}
    for name, found in known.items():
        assert peak_rates(name) is GPUS[found]
    for name in (
        "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
    ):  # fmt: skip
        assert peak_rates(name) is None


@pytest.mark.parametrize(
    "name, operations", [("A100", 2048), ("H100", 4096), ("H200", 4096), ("B200", 8192), ("RTX 5090", 512)]
)
def test_clocks_are_those_of_the_peak_operations(name, operations):
    """operations: dense bfloat16 operations that a multiprocessor's tensor cores do in a cycle, by the white papers."""
    gpu = GPUS[name]
    assert gpu.multiprocessors * operations * gpu.clock == pytest.approx(gpu.flops, rel=0.005)
