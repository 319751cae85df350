"""Rates that this machine reaches in this process: a copy, a read and a triad of memory, and matrix products.

A data sheet is never reached. What a copy reaches is the fair measure of a kernel that moves bytes, and what the
vendor's matrix product reaches at the same shape is that of a kernel that multiplies.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GEMM_SHAPES = {
    "query, key or value": (100_864, 768, 768),
    "query, key and value": (100_864, 2304, 768),
    "up": (100_864, 3072, 768),
    "down": (100_864, 768, 3072),
    "weight gradient of up": (3072, 768, 100_864),
    "pixel head": (29_696, 768, 768),
    "LM head": (922, 50_265, 768),
}
"""Matrix products (M, N, K) of a step of `base` with 256 pairs. 100,864 rows are 512 images of 197 tokens."""


@dataclass(frozen=True)
class MemoryRates:
    """Bytes per second, counting what is read and what is written."""

    copy: float
    read: float
    triad: float


def memory_rates(device: str, megabytes: int = 0) -> MemoryRates:
    """Measure a copy, a read and a triad a + s*b of arrays of `megabytes` (0: 1,024 on a GPU, 64 on a CPU)."""
    count = (megabytes or (1024 if device == "cuda" else 64)) * 2**20 // 4
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    total = torch.empty((), device=device)
    if device == "cuda":
        warm_up(lambda: b.copy_(a))
    return MemoryRates(
        copy=2 * 4 * count / median_seconds(lambda: b.copy_(a), device),
        read=4 * count / median_seconds(lambda: torch.sum(a, dim=0, out=total), device),
        triad=3 * 4 * count / median_seconds(lambda: torch.add(a, b, alpha=3.0, out=c), device),
    )


def warm_up(call: Callable[[], Any], seconds: float = 0.5) -> None:
    """Repeat a call on a GPU for a while. At the clocks of an idle GPU the rates are lower, and kernels look better."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        torch.cuda.synchronize()


def gemm_seconds(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    """Seconds of torch's matrix product (M, K) x (K, N). Both operands are random: zeros draw less power."""
    m, n, k = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    return median_seconds(lambda: a @ b.T, device)


def ceiling_rows(device: str, dtype: torch.dtype, shrink: int = 1) -> list[dict[str, Any]]:
    """Rows of all ceilings: name, shape, dtype, `us`, and `gb_per_s` or `tflops`.

    Args:
        shrink: divisor of every size, for a rehearsal on a CPU.
    """
    rates = memory_rates(device, max(1, 1024 // shrink))
    rows: list[dict[str, Any]] = [
        {"name": name, "shape": "", "dtype": "float32", "us": None, "gb_per_s": getattr(rates, name) / 1e9}
        for name in ("copy", "read", "triad")
    ]
    for name, shape in GEMM_SHAPES.items():
        m, n, k = (max(8, size // shrink) for size in shape)
        seconds = gemm_seconds((m, n, k), dtype, device)
        row = {"name": name, "shape": f"{m}x{n}x{k}", "dtype": str(dtype).removeprefix("torch."), "us": 1e6 * seconds}
        rows.append(row | {"tflops": 2 * m * n * k / seconds / 1e12})
    return rows


def median_seconds(call: Callable[[], Any], device: str) -> float:
    """Median seconds of seven calls, each between two synchronisations, after two calls for warm-up.

    On a GPU a call is repeated until it takes a millisecond, so that the synchronisation does not count.
    """
    cuda = device == "cuda"

    def timed(repeats: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    timed(1)
    repeats = max(1, round(1e-3 / max(timed(1), 1e-7))) if cuda else 1
    return statistics.median(timed(repeats) for _ in range(7))
