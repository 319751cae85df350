"""The faster interpreter of the tests: its products are those of any processor."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, out_ptr):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + 16 * rows + columns), tl.load(b_ptr + 16 * rows + columns)
    tl.store(out_ptr + 16 * rows + columns, tl.dot(a, b, acc=tl.load(out_ptr + 16 * rows + columns)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_rounded_once_and_the_sum_of_tiles_in_its_own_type(dtype):
    draw = torch.Generator().manual_seed(0)
    a, b, out = (torch.randn(16, 16, generator=draw, dtype=dtype) for _ in range(3))
    wanted = (a.double() @ b.double()).to(dtype) + out
    product[(1,)](a, b, out)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0 if dtype == torch.float32 else 1e-14)
