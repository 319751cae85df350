"""Helpers that give interpreted kernels a GPU's meaning of bfloat16."""
# pyright: reportArgumentType=false

import pytest
import torch
import triton
import triton.language as tl

from mvlm_kernels.dispatch import launch
from mvlm_kernels.language import INTERPRETING, cast, dot, widen

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="checks the interpreter; run without TRITON_INTERPRET=0")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    r = tl.arange(0, N)
    tl.store(y_ptr + r, cast(tl.load(x_ptr + r), y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, ACC: tl.constexpr):
    r = tl.arange(0, N)
    at = r[:, None] * N + r[None, :]
    acc = dot(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.zeros((N, N), ACC), "ieee")
    tl.store(c_ptr + at, acc + widen(tl.load(a_ptr + at), ACC))


def test_cast_to_bfloat16_rounds_to_nearest_even():
    torch.manual_seed(0)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, float("inf"), -float("inf"), 3.4e38, 1e-40])
    x = torch.cat([torch.randn(2048 - len(ties)) * 10.0 ** torch.randint(-30, 30, (2048 - len(ties),)), ties])
    y = torch.full_like(x, float("nan"), dtype=torch.bfloat16)
    launch(_cast_kernel, (1,), x, y, 2048)
    assert torch.equal(y, x.bfloat16())


def test_cast_keeps_nan():
    low_payload = torch.tensor([0x7F800001, 0x7FC00000, -1], dtype=torch.int32)  # signalling, quiet, negative
    x = torch.cat([low_payload.view(torch.float32), torch.zeros(1)])
    y = torch.zeros(4, dtype=torch.bfloat16)
    launch(_cast_kernel, (1,), x, y, 4)
    assert y.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dot_and_widen(dtype: torch.dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32, dtype=torch.float64).to(dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    c = torch.empty(32, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    launch(_dot_kernel, (1,), a, b, c, 32, acc)
    wanted = a.double() @ b.double() + a.double()
    torch.testing.assert_close(c.double(), wanted, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-4)
