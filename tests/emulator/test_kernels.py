"""Every kernel of ``mvlm_kernels`` as compiled for a GPU, on many cases (`make emulate`)."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from emulator.cases import all_cases, fast_cases
from emulator.library import forget_kernels, on_gpu, watched_allocations
from mvlm_kernels import aot
from triton_proof.driver import ARCHS, recorded
from triton_proof.report import Launch

CASES = all_cases()
FAST = fast_cases()
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Forget compiled kernels now and then: those of all cases take more than 10 GB."""
    yield
    if next(_numbers) % 50 == 0:
        forget_kernels()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in CASES])
def test_kernels_are_right_and_without_fault(name: str, arch: str) -> None:
    torch.manual_seed(0)
    with on_gpu(arch), recorded(on_fault="collect", counting=False) as launches, watched_allocations():
        try:
            CASES[name]()
        except AssertionError as error:
            error.add_note(faults_of(launches))
            raise
    assert not faults_of(launches), faults_of(launches)


def faults_of(launches: list[Launch]) -> str:
    return "\n".join(str(finding) for launch in launches for finding in launch.findings)


def test_fast_cases_launch_every_kernel_that_is_compiled_ahead_of_time() -> None:
    assert set(CASES) >= FAST
    launched = set()
    for name in FAST:
        with on_gpu("sm_80"), recorded(on_fault="collect", checks=False, counting=False) as launches:
            CASES[name]()
        launched |= {launch.kernel for launch in launches}
    compiled = {launch.kernel.__name__ for op in aot.CASES for launch in aot.recorded(op, "sm_80")}
    assert len(compiled) > 15
    assert compiled - launched == set(), "add a fast case in emulator/cases"
