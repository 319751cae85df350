# pyright: reportArgumentType=false, reportCallIssue=false
"""Values that emulated kernels compute, against torch: elementwise, roundings, reductions, atomics, loops."""

import pytest
import torch
import triton
import triton.language as tl

from triton_proof.driver import recorded

pytestmark = pytest.mark.usefixtures("arch")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def rand(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@pytest.mark.parametrize("dtype", [F32, F16, torch.int32, torch.int64, torch.uint8], ids=str)
def test_sums_of_every_type(dtype: torch.dtype) -> None:
    x, y = (rand(1003, seed=i).mul(10).to(dtype) for i in range(2))
    out = torch.zeros_like(x)
    add[(8,)](x, y, out, 1003, BLOCK=128)
    assert torch.equal(out, x + y)


def test_bytes_of_loads_and_stores_are_counted() -> None:
    x, y, out = rand(1003), rand(1003), torch.zeros(1003)
    with recorded() as launches:
        add[(8,)](x, y, out, 1003, BLOCK=128)
    assert launches[0].total("global load").bytes == 2 * 1003 * 4
    assert launches[0].total("global store").bytes == 1003 * 4
    assert launches[0].total("global load").units == 2 * -(-1003 * 4 // 32)
    assert launches[0].grid == (8, 1, 1)


@triton.jit
def elementwise(x, y, out, out_int, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i).to(tl.float32), tl.load(y + i).to(tl.float32)
    tl.store(out + i, tl.exp2(a))
    tl.store(out + n + i, tl.log2(tl.abs(a)))
    tl.store(out + 2 * n + i, a / b)
    tl.store(out + 3 * n + i, tl.sqrt(tl.abs(a)))
    tl.store(out + 4 * n + i, tl.maximum(a, b))
    tl.store(out + 5 * n + i, tl.minimum(a, b))
    tl.store(out + 6 * n + i, tl.where(a > b, a, b) * 0.5)
    tl.store(out + 7 * n + i, tl.exp(a))
    tl.store(out + 8 * n + i, tl.fma(a, b, a))
    k = (a * 1000).to(tl.int32)
    m = (b * 100).to(tl.int32) + 1000
    tl.store(out_int + i, k // m)
    tl.store(out_int + n + i, k % m)
    tl.store(out_int + 2 * n + i, (k << 3) ^ (m >> 2))
    tl.store(out_int + 3 * n + i, (k.to(tl.int64) * m * 1000003 >> 20).to(tl.int32))
    tl.store(out_int + 4 * n + i, a.to(tl.int8).to(tl.int32))
    tl.store(out_int + 5 * n + i, k // 7 + k % 13)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_elementwise_functions_and_integer_arithmetic(dtype: torch.dtype) -> None:
    n = 512
    x, y = rand(n, dtype=dtype), rand(n, dtype=dtype, seed=1)
    out, ints = torch.zeros(9, n), torch.zeros(6, n, dtype=torch.int32)
    elementwise[(4,)](x, y, out, ints, n, BLOCK=128)
    a, b = x.double(), y.double()
    wanted = [
        a.exp2(), a.abs().log2(), a / b, a.abs().sqrt(), a.maximum(b), a.minimum(b), a.maximum(b) * 0.5, a.exp(),
        a * b + a,
    ]  # fmt: skip
    torch.testing.assert_close(out.double(), torch.stack(wanted), rtol=3e-6, atol=1e-6)
    k, m = (x.float() * 1000).int(), (y.float() * 100).int() + 1000
    quotient = torch.div(k, m, rounding_mode="trunc")
    sevens = torch.div(k, 7, rounding_mode="trunc") + k.fmod(13)
    whole = [quotient, k - quotient * m, (k << 3) ^ (m >> 2), (k.long() * m * 1000003 >> 20).int()]
    assert torch.equal(ints, torch.stack([*whole, x.float().to(torch.int8).int(), sevens]))


@triton.jit
def casts(x, brain, half, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    tl.store(brain + i, a.to(tl.bfloat16))
    tl.store(half + i, a.to(tl.float16))


def test_rounding_to_16_bits() -> None:
    special = [0.0, -0.0, float("inf"), float("-inf"), 1e-45, 65520.0, 65519.9, 3.3e38, 1.00390625, 1.01171875, 6e-8]
    x = torch.cat([torch.tensor(special), rand(1024 - len(special)) * 10.0])
    brain, half = torch.zeros(1024, dtype=BF16), torch.zeros(1024, dtype=F16)
    casts[(1,)](x, brain, half, n=1024)
    assert torch.equal(brain, x.bfloat16())
    assert torch.equal(half, x.half())
    x[:] = torch.nan
    casts[(1,)](x, brain, half, n=1024)
    assert brain.isnan().all()
    assert half.isnan().all()


@triton.jit
def reduce(x, out_sum, out_max, out_arg, out_axis, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + i * N + j)
    tl.store(out_sum + tl.arange(0, M), tl.sum(a, 1))
    tl.store(out_axis + tl.arange(0, N), tl.sum(a, 0))
    tl.store(out_max + tl.arange(0, M), tl.max(a, 1))
    tl.store(out_arg + tl.arange(0, M), tl.argmax(a, 1))


@pytest.mark.slow
@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("shape", [(16, 64), (4, 256), (64, 32)])
def test_reductions(shape: tuple[int, int], warps: int) -> None:
    x = rand(*shape)
    rows, most, where = torch.zeros(shape[0]), torch.zeros(shape[0]), torch.zeros(shape[0], dtype=torch.int32)
    columns = torch.zeros(shape[1])
    reduce[(1,)](x, rows, most, where, columns, M=shape[0], N=shape[1], num_warps=warps)
    torch.testing.assert_close(rows, x.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(columns, x.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(most, x.amax(1))
    assert torch.equal(where.long(), x.argmax(1))


@triton.jit
def scan(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.cumsum(tl.load(x + i), 0))


def test_cumulative_sum() -> None:
    x = torch.randint(-9, 9, (512,), dtype=torch.int32)
    out = torch.zeros_like(x)
    scan[(1,)](x, out, N=512)
    assert torch.equal(out, x.cumsum(0).int())


@triton.jit
def histogram(x, out, total, largest, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(x + i, mask=inside, other=0)
    tl.atomic_add(out + a, 1, mask=inside)
    tl.atomic_add(total, tl.sum(a.to(tl.float32)))
    tl.atomic_max(largest, tl.max(a))


def test_atomic_sums_and_maxima() -> None:
    x = torch.randint(0, 17, (1000,), dtype=torch.int32)
    out, total, largest = torch.zeros(17, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    histogram[(8,)](x, out, total, largest, 1000, BLOCK=128)
    assert torch.equal(out, x.bincount(minlength=17).int())
    assert total.item() == x.sum().item()
    assert largest.item() == x.max().item()


@triton.jit
def compare_and_swap(lock, out):
    old = tl.atomic_cas(lock, 0, 1 + tl.program_id(0))
    tl.store(out + tl.program_id(0), old)
    tl.atomic_xchg(lock + 1, tl.program_id(0))


def test_compare_and_swap_takes_the_first_program() -> None:
    lock, out = torch.zeros(2, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    compare_and_swap[(4,)](lock, out)
    assert lock[0] == 1
    assert out.tolist() == [0, 1, 1, 1]


@triton.jit
def walk(next_ptr, value, out, n):
    b = tl.program_id(0)
    k = tl.load(next_ptr + b)
    total = 0.0
    while k >= 0:
        total += tl.load(value + k)
        k = tl.load(next_ptr + k)
    if b % 2 == 0:
        tl.store(out + b, total)
    else:
        tl.store(out + b, -total)


@pytest.mark.parametrize("lockstep", [1, 300, 100_000])
def test_loops_of_different_lengths_for_any_number_of_threads_in_lockstep(lockstep: int) -> None:
    n = 64
    chain = torch.arange(n, dtype=torch.int32) - 3
    chain[:3] = -1
    value, out = rand(n), torch.zeros(n)
    with recorded(lockstep=lockstep):
        walk[(n,)](chain, value, out, n)
    for b in range(n):
        wanted = sum(value[k].item() for k in range(b - 3, -1, -3))
        assert abs(out[b].item() - (wanted if b % 2 == 0 else -wanted)) < 1e-5
