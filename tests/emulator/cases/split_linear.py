"""Cases of ``split_linear``: gradients side by side, and their sums, against float64."""

from functools import partial
from importlib import import_module

import torch

from emulator.cases import Cases
from emulator.library import multiprocessors

FAST = {"bf16/3x17x300"}


def check(dtype: torch.dtype, count: int, rows: int, width: int) -> None:
    parts = [torch.randn(rows, width).to(dtype) for _ in range(count)]
    with multiprocessors(1):
        stacked, sums = import_module("mvlm_kernels.split_linear.triton").stack_rows(*parts)
    assert torch.equal(stacked, torch.stack(parts, 1))
    torch.testing.assert_close(sums.double(), torch.stack(parts).double().sum(1), rtol=1e-5, atol=1e-5)


def cases() -> Cases:
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for count, rows, width in ((3, 17, 300), (2, 1, 8), (3, 197, 768)):
            yield f"{name}/{count}x{rows}x{width}", partial(check, dtype, count, rows, width)
