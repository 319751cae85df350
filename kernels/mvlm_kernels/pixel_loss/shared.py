# pyright: reportArgumentType=false
"""Tile sizes, and the sum of partial results, for the forward and the backward of ``linear_pixel_loss``."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import configs, dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.gather_patches.triton import accumulator
from mvlm_kernels.language import cast, widen


@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, grad_ptr, n, num_partials, divisor,
    HAS_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write sum(partial) / divisor * grad to out (n). partial is (num_partials, n), added in rising order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    # Advance the pointer: an offset of partial times n could overflow int32.
    partial_ptrs = partial_ptr + i
    for _ in range(0, num_partials):
        total += tl.load(partial_ptrs, mask=i < n, other=0.0)
        partial_ptrs += n
    total = total / divisor
    if HAS_GRAD:
        total = total * widen(tl.load(grad_ptr), ACC)
    tl.store(out_ptr + i, cast(total, out_ptr.dtype.element_ty), mask=i < n)


@functools.cache
def tiles(kernel: str, dtype: torch.dtype, target: int) -> dict[str, int]:
    """Tile sizes of a kernel for a compute capability. float64 runs in the interpreter only, with tiles of float32."""
    bits = "16" if dtype in (torch.float16, torch.bfloat16) else "32"
    return configs.lookup("linear_pixel_loss", target, f"{kernel}/{bits}")


def sum_partials(partial: Tensor, out: Tensor, grad: Tensor | None, divisor: int) -> None:
    """Launch ``sum_partials_kernel``: out = partial.sum(0) / divisor * grad.

    out has n elements, partial is (parts, n), and grad is a scalar tensor, or None for 1.
    """
    n = out.numel()
    dispatch.launch(
        sum_partials_kernel, (ceil_div(n, 1024),), partial, out, grad, n, partial.shape[0], divisor,
        HAS_GRAD=grad is not None, ACC=accumulator(partial.dtype), BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
