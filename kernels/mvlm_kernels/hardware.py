"""Peak rates of NVIDIA GPUs, from their data sheets, and what a multiprocessor holds."""

import re
from dataclasses import dataclass
from typing import NamedTuple

LANES = 4 * 32
"""Lanes of the instructions that a multiprocessor issues in a cycle: one of a warp by each of four schedulers."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    bandwidth: bytes per second of its memory. flops: dense bfloat16 operations per second. source: the data sheet.
    arch: compute capability as an int. multiprocessors: number of them. clock: cycles per second, at which flops are
    reached.
    """

    bandwidth: float
    flops: float
    source: str
    arch: int
    multiprocessors: int
    clock: float

    @property
    def issues(self) -> float:
        """Instructions of single lanes issued per second."""
        return self.multiprocessors * LANES * self.clock


GPUS = {
    "A100": Gpu(2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB", 80, 108, 1.41e9),
    "H100": Gpu(
        3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity", 90, 132, 1.83e9
    ),
    "H200": Gpu(
        4.8e12, 989e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity", 90, 132, 1.83e9
    ),
    "B200": Gpu(
        8.0e12, 2250e12, "NVIDIA HGX B200 data sheet: an eighth of 64 TB/s and of 36 PFLOPS with sparsity, halved",
        100, 148, 1.86e9,
    ),
    "RTX 5090": Gpu(
        1.792e12, 209.5e12, "NVIDIA RTX Blackwell GPU Architecture, table of the GeForce RTX 5090", 120, 170, 2.41e9
    ),
}  # fmt: skip


def peak_rates(device_name: str) -> Gpu | None:
    """Peak rates of a GPU by its CUDA device name; None for a GPU that is not in :data:`GPUS`.

    The table lists SXM parts (A100: 80 GB). PCIe, NVL, 40 GB and laptop versions, the 5090 D and MIG slices have other
    rates, so the result is None for them.
    """
    if re.search(r"PCIe|NVL|40GB|MIG|Laptop|5090 D", device_name, re.IGNORECASE):
        return None
    found = re.search(rf"\b({'|'.join(GPUS)})\b", device_name)
    return GPUS[found.group(1)] if found else None


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor: resident warps and blocks, and KiB of shared memory for all blocks and for one."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164, 163),
    86: Multiprocessor(48, 16, 100, 99),
    89: Multiprocessor(48, 24, 100, 99),
    90: Multiprocessor(64, 32, 228, 227),
    100: Multiprocessor(64, 32, 228, 227),
    120: Multiprocessor(48, 24, 100, 99),
}
"""Limits of a multiprocessor by compute capability, from the technical specifications of the CUDA C++ programming
guide. Capabilities that are not listed get those of 86, the smallest."""
SAME = {103: 100, 121: 120}
"""Compute capabilities whose multiprocessors hold what those of another one hold: B300, and GB10 of DGX Spark."""


def multiprocessor(arch: int) -> Multiprocessor:
    """Limits of the multiprocessors of a compute capability such as 90."""
    return MULTIPROCESSORS.get(SAME.get(arch, arch), MULTIPROCESSORS[86])


def blocks(registers: int, warps: int, shared: int, arch: int) -> int:
    """Blocks that one multiprocessor holds at once, at most.

    By 65,536 registers, given out to warps in units of 256; by warps and blocks; and by shared memory, of which the
    system keeps 1 KiB a block. registers: of a thread. shared: bytes of a block.
    """
    most = multiprocessor(arch)
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (of_a_warp * warps), most.warps // warps, most.blocks, most.shared * 1024 // (shared + 1024))
