"""Every kernel of ``mvlm_kernels`` as compiled for a GPU, on many cases (`make emulate`)."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from emulator.edges import all_calls, fast_calls
from emulator.library import check_compiled, forget_kernels, on_gpu, watched_allocations
from mvlm_kernels import cases
from triton_proof.driver import ARCHS, recorded
from triton_proof.report import Launch

CASES = {name: partial(check_compiled, case) for name, case in cases.emulated().items()} | all_calls()
FAST = cases.fast() | fast_calls()
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Forget compiled kernels now and then: those of all cases take more than 10 GB."""
    yield
    if next(_numbers) % 50 == 0:
        forget_kernels()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "name",  # pytest replaces ids of more than 100 characters, and -k would not find them
    [pytest.param(x, id=x[:80], marks=() if x in FAST else pytest.mark.slow) for x in CASES],
)
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
    compiled = {x.kernel.__name__ for case in cases.compiled() if case.runs_on(80) for x in case.launches(80)}
    assert len(compiled) > 15
    assert compiled - launched == set(), "add a case to FAST in cases.py of the op"
