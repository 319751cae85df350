"""Peak rates of NVIDIA data-centre GPUs, from their data sheets."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    bandwidth: bytes per second of its memory. flops: dense bfloat16 operations per second. source: the data sheet.
    """

    bandwidth: float
    flops: float
    source: str


GPUS = {
    "A100": Gpu(2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB"),
    "H100": Gpu(3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity"),
    "H200": Gpu(4.8e12, 989e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity"),
    "B200": Gpu(
        8.0e12, 2250e12, "NVIDIA HGX B200 data sheet: an eighth of 64 TB/s and of 36 PFLOPS with sparsity, halved"
    ),
}


def peak_rates(device_name: str) -> Gpu | None:
    """Peak rates of a GPU by its CUDA device name; None for a GPU that is not in :data:`GPUS`.

    The table lists SXM parts (A100: 80 GB). PCIe, NVL and 40 GB versions and MIG slices have other rates, so the result
    is None for them.
    """
    if re.search(r"PCIe|NVL|40GB|MIG", device_name, re.IGNORECASE):
        return None
    found = re.search(rf"\b({'|'.join(GPUS)})\b", device_name)
    return GPUS[found.group(1)] if found else None
