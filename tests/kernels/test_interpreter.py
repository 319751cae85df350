"""The faster interpreter of the tests: it computes the same, and leaves `triton.language` as it was."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from support.kernels.interpreter import patch_once_a_launch


@triton.jit
def twice(x):
    return x + x


@triton.jit
def sum_of_doubles(x_ptr, out_ptr, calls: tl.constexpr, fail: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    for _ in range(calls):
        x = twice(x)
    tl.static_assert(not fail)
    tl.store(out_ptr, tl.sum(x, axis=0))


def launch(calls: int, fail: bool = False) -> float:
    out = torch.zeros(1)
    constants: dict[str, Any] = {"calls": calls, "fail": fail}
    sum_of_doubles[(1,)](torch.arange(8.0), out, **constants)
    return float(out)


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


def test_the_language_is_restored_after_a_launch_that_fails_too():
    assert patch_once_a_launch()
    before = tl.load, tl.arange, tl.range, tl.tensor.__add__
    assert launch(calls=2) == 112
    assert before == (tl.load, tl.arange, tl.range, tl.tensor.__add__)
    with pytest.raises(Exception, match=r"static_assert|AssertionError"):
        launch(calls=1, fail=True)
    assert before == (tl.load, tl.arange, tl.range, tl.tensor.__add__)
    assert launch(calls=2) == 112
