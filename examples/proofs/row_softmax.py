# pyright: reportArgumentType=false, reportCallIssue=false
"""Softmax over the rows of a matrix, as tutorials write it: one program a row, the whole row in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def row_softmax(x: Tensor) -> Tensor:
    """Softmax of x (rows, width), float16 or float32 with contiguous rows; contiguous."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    row_softmax_kernel[(rows,)](x, out, x.stride(0), width, BLOCK=triton.next_power_of_2(width))
    return out
