# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernel of ``split_linear`` and its launcher, which walk and sum as those of ``gelu_linear`` do."""

import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.language import accumulator, sum_columns, walking, widen

BLOCK_R, BLOCK_C, WARPS = 8, 256, 4
REGISTERS = 64
"""Most registers of a thread, so that a multiprocessor holds 8 programs. Without this limit the kernel takes 48 in 16
bits, and 56 to 64 in float32."""


@triton.jit(do_not_specialize=["R"])
def stack_rows_kernel(
    parts, out_ptr, partial_ptr, R, W,
    N: tl.constexpr, SLICES: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (R, N, W) from N parts (R, W), contiguous; partial (programs along rows, N, W).

    Program (rows, slice of the columns of a part).
    """
    part = tl.program_id(1) // SLICES
    c = tl.program_id(1) % SLICES * BLOCK_C + tl.arange(0, BLOCK_C)
    part_ptr = parts[0]
    for i in tl.static_range(1, N):
        if part == i:
            part_ptr = parts[i]
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (r < R)[:, None] & (c < W)[None, :]
        x = tl.load(part_ptr + (r * W)[:, None] + c[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + ((r * N + part) * W)[:, None] + c[None, :], x, mask=inside)
        total += widen(x, ACC)
    share = partial_ptr + (tl.program_id(0).to(tl.int64) * N + part) * W
    tl.store(share + c, tl.sum(total, axis=0), mask=c < W)


def stack_rows(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`.reference.stack_rows`."""
    (rows, width), count, first = parts[0].shape, len(parts), parts[0]
    slices, wide = ceil_div(width, BLOCK_C), compute_dtype(first.dtype)
    out, sums = first.new_empty(rows, count, width), first.new_empty(count, width, dtype=wide)
    grid, options = walking(
        stack_rows_kernel, first.device, rows, count * slices, N=count, SLICES=slices, ACC=accumulator(first.dtype),
        BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=WARPS, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    partial_sums = first.new_empty(grid[0], count, width, dtype=wide)
    dispatch.launch(
        stack_rows_kernel, grid, tuple(x.contiguous() for x in parts), out, partial_sums, rows, width, **options
    )
    sum_columns(partial_sums, sums, grid[0], count * width)
    return out, sums
