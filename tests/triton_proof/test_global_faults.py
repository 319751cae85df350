# pyright: reportArgumentType=false, reportCallIssue=false
"""Faults in global memory, planted: each is found by its kind, and the kernel without it is clean."""

import pytest
import torch
import triton
import triton.language as tl

from triton_proof.driver import recorded, settings, uninitialised, unwritten
from triton_proof.report import EmulationError, Finding, remedy, summary

pytestmark = pytest.mark.usefixtures("arch")


def launch(kernel, grid, *args, **kwargs) -> list[Finding]:
    with recorded(on_fault="collect") as launches:
        kernel[grid](*args, **kwargs)
    return launches[-1].findings


def kinds(findings: list[Finding]) -> set[str]:
    return {f.kind for f in findings}


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, EXTRA: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    load_mask = i < n + EXTRA if MASK_LOAD else i >= 0
    store_mask = i < n if MASK_STORE else i >= 0
    tl.store(out + i, tl.load(x + i, mask=load_mask, other=0.0), mask=store_mask)


GOOD = {"BLOCK": 128, "MASK_LOAD": True, "MASK_STORE": True, "EXTRA": 0}


def buffers(n: int, room: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of n elements with room behind them, so that planted stores do no harm."""
    return torch.randn(n + room)[:n], torch.zeros(n + room)[:n]


def test_masked_copy_is_clean() -> None:
    x, out = buffers(1000)
    assert not launch(copy, (8,), x, out, 1000, **GOOD)
    assert torch.equal(x, out)


@pytest.mark.parametrize(
    "fault, where, lanes",
    [({"MASK_LOAD": False}, "past the end of x", 24), ({"MASK_STORE": False}, "past the end of out", 24),
     ({"EXTRA": 1}, "past the end of x", 1)], ids=["load", "store", "off-by-one"],
)  # fmt: skip
def test_missing_mask_is_out_of_bounds(fault: dict[str, int], where: str, lanes: int) -> None:
    x, out = buffers(1000)
    found = launch(copy, (8,), x, out, 1000, **(GOOD | fault))
    assert kinds(found) == {"out-of-bounds"}
    assert where in found[0].detail
    assert found[0].where[0][0].endswith("test_global_faults.py")
    assert sum(f.count for f in found) == lanes
    assert not out[1000:].any(), "the access was made"


def test_a_load_across_the_end_says_how_far_it_goes() -> None:
    """A thread loads four floats at once, of which the last two are outside."""
    x, out = buffers(998)
    (found,) = launch(copy, (2,), x, out, 998, **(GOOD | {"BLOCK": 512, "MASK_LOAD": False}))
    assert "ends 8 bytes past the end of x" in found.detail


def test_faults_are_raised_by_default() -> None:
    x, out = buffers(1000)
    with pytest.raises(EmulationError, match="out-of-bounds"):
        copy[(8,)](x, out, 1000, **(GOOD | {"MASK_LOAD": False}))


def test_too_small_a_grid_leaves_output_unwritten() -> None:
    x, _ = buffers(1000)
    out = uninitialised(torch.empty(1000))
    try:
        assert not launch(copy, (7,), x, out, 1000, **GOOD)
        assert unwritten(out) == 1000 - 7 * 128
        assert not launch(copy, (8,), x, out, 1000, **GOOD)
        assert unwritten(out) == 0
    finally:
        settings.unwritten.clear()


def test_load_of_what_nobody_wrote() -> None:
    x, out = uninitialised(torch.empty(1000)), torch.zeros(1000)
    try:
        assert kinds(launch(copy, (8,), x, out, 1000, **GOOD)) == {"uninitialised"}
        x[:] = 1.0
        assert not launch(copy, (8,), x, out, 1000, **GOOD)
    finally:
        settings.unwritten.clear()


@triton.jit
def neighbours(x, out, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Copies of blocks that overlap if STEP is less than BLOCK."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


def test_two_programs_that_store_to_one_place() -> None:
    x, out = torch.randn(1024), torch.zeros(1024)
    assert not launch(neighbours, (8,), x, out, BLOCK=128, STEP=128)
    assert kinds(launch(neighbours, (8,), x, out, BLOCK=128, STEP=127)) == {"global-race"}


@triton.jit
def shift(x, BLOCK: tl.constexpr):
    """Shift in place, in which every program reads what its neighbour writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i + 1)
    tl.store(x + i, a)


def test_program_that_reads_what_another_writes() -> None:
    assert kinds(launch(shift, (8,), torch.randn(1025), BLOCK=128)) == {"global-race", "race"}


@triton.jit
def accumulate(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i) + tl.load(x + tl.program_id(0) * BLOCK + i))


def test_sum_of_several_programs_without_atomics() -> None:
    assert kinds(launch(accumulate, (4,), torch.randn(512), torch.zeros(128), BLOCK=128)) == {"global-race"}
    assert not launch(accumulate, (1,), torch.randn(512), torch.zeros(128), BLOCK=128)


@triton.jit
def turned(x, out, scratch, N: tl.constexpr, BARRIER: tl.constexpr):
    """Reversal through global memory, from each thread to another."""
    i = tl.arange(0, N)
    tl.store(scratch + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + N - 1 - i))


def test_threads_of_a_block_that_meet_in_global_memory() -> None:
    x, out, scratch = torch.randn(128), torch.zeros(128), torch.zeros(128)
    assert not launch(turned, (1,), x, out, scratch, N=128, BARRIER=True)
    assert torch.equal(out, x.flip(0))
    found = launch(turned, (1,), x, out, scratch * 0, N=128, BARRIER=False)
    assert kinds(found) == {"race"}
    assert "debug_barrier" in remedy(found[0])


def test_a_line_is_one_finding_whose_launches_are_counted() -> None:
    """Eight elements of a thread are two instructions of a line."""
    out, scratch = torch.zeros(1024), torch.zeros(1024)
    first = launch(turned, (1,), torch.randn(1024), out, scratch, N=1024, BARRIER=False)
    assert len(first) > 1
    assert summary(first).count("race: ") == 1
    assert "launches" not in summary(first)
    again = launch(turned, (1,), torch.randn(1024), out, scratch, N=1024, BARRIER=False)
    assert "in 2 launches" in summary([*first, *again])


@triton.jit
def scatter(index, x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.load(index + i), tl.load(x + i))


def test_lanes_that_store_different_values_to_one_place() -> None:
    index = torch.arange(128, dtype=torch.int32)
    assert not launch(scatter, (1,), index, torch.randn(128), torch.zeros(128), BLOCK=128)
    index[7] = 8
    assert kinds(launch(scatter, (1,), index, torch.randn(128), torch.zeros(128), BLOCK=128)) == {"global-race"}


def test_grids_that_no_gpu_launches() -> None:
    x, out = buffers(128)
    for grid in ((1, 65536), (1, 1, 65536)):
        with pytest.raises(ValueError, match="no GPU launches"):
            copy[grid](x, out, 128, **GOOD)
