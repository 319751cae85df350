# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Matrix products of emulated kernels, against float64: tensor-core fragments and pipelines."""

import pytest
import torch
import triton
import triton.language as tl

from triton_proof.driver import recorded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TILES = [(1, 4, (64, 64, 32)), (3, 4, (64, 32, 32)), (2, 8, (128, 64, 64)), (1, 4, (16, 16, 16)), (3, 4, (32, 64, 64))]


def rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def matmul(
    a, b, c, M, N, K, sam, sak, sbk, sbn, scm, scn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * sam + k[None, :] * sak, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * sbk + n[None, :] * sbn, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(
        c + m[:, None] * scm + n[None, :] * scn, acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


def tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 as a tensor core reads it: the 13 low bits dropped."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = (tf32(a), tf32(b)) if a.dtype == F32 else (a, b)
    return x.double() @ y.double()


@pytest.mark.parametrize("layout", ["nn", *(pytest.param(x, marks=pytest.mark.slow) for x in ("nt", "tn", "tt"))])
@pytest.mark.parametrize("dtype", [BF16, F32, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("stages, warps, tile", [TILES[1], *(pytest.param(*t, marks=pytest.mark.slow) for t in TILES)])
def test_matrix_product(
    arch: str, dtype: torch.dtype, layout: str, stages: int, warps: int, tile: tuple[int, int, int]
) -> None:
    m, n, k = 144, 80, 176  # multiples of 16, so that loads are wide, but not of the tiles
    a, b = rand(m, k, dtype=dtype), rand(k, n, dtype=dtype, seed=1)
    if layout[0] == "t":
        a = a.t().contiguous().t()
    if layout[1] == "t":
        b = b.t().contiguous().t()
    c = torch.full((m, n), torch.nan)
    grid = (triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1]))
    with recorded() as launches:
        matmul[grid](
            a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), BM=tile[0], BN=tile[1], BK=tile[2],
            PRECISION="tf32" if dtype == F32 else "ieee", num_stages=stages, num_warps=warps,
        )  # fmt: skip
    torch.testing.assert_close(c.double(), product(a, b), rtol=1e-5, atol=1e-4)
    assert launches[0].flops >= 2 * m * n * k
    used = launches[0].instructions
    assert ("wgmma" if arch == "sm_90" and tile[0] >= 64 else "mma") in used
    assert stages == 1 or "cp.async" in used


@pytest.mark.slow
@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_matrix_product_of_odd_sizes(dtype: torch.dtype) -> None:
    a, b, c = rand(67, 101, dtype=dtype), rand(101, 35, dtype=dtype, seed=1), torch.full((67, 35), torch.nan)
    matmul[2, 2](
        a, b, c, 67, 35, 101, *a.stride(), *b.stride(), *c.stride(), BM=64, BN=32, BK=32, PRECISION="tf32",
        num_stages=3,
    )  # fmt: skip
    torch.testing.assert_close(c.double(), product(a, b), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("lockstep", [1, 300, 100_000])
def test_matrix_product_for_any_number_of_threads_in_lockstep(lockstep: int) -> None:
    a, b = rand(144, 64, dtype=BF16), rand(64, 80, dtype=BF16)
    results = torch.zeros(144, 80), torch.ones(144, 80)
    for c, size in zip(results, (lockstep, 4096), strict=True):
        with recorded(lockstep=size):
            matmul[3, 2](a, b, c, 144, 80, 64, 64, 1, 80, 1, 80, 1, BM=64, BN=64, BK=32, PRECISION="ieee")
    assert torch.equal(*results)
