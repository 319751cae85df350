"""Cases of `mvlm bench kernels` for pytest-benchmark: `pytest benchmarks/bench_kernels.py`.

Use it to compare saved runs (`--benchmark-autosave`, `--benchmark-compare`). It measures host time, including the
launch, with warm caches. To quote a figure, use `mvlm bench kernels`. On a CPU the core cases run at a small size, as
torch references. Plain `pytest` does not collect this file.
"""

import functools

import pytest
import torch

from mvlm_benchmarks.clock import make_clock, torch_settings
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.checks import torch_reasons
from mvlm_benchmarks.kernels.compare import Entry, prepare
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import PEERS, ours_as_peer
from mvlm_benchmarks.kernels.reference import CaseData, passes_of
from mvlm_kernels.case import Case

# Warnings are errors in the test suite, but peers may warn: SDPA gives the reason for a refused backend in a warning.
pytestmark = pytest.mark.filterwarnings("default")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    case
    for case in cases(*((256, torch.bfloat16) if DEVICE == "cuda" else (2, torch.float32)))
    if case.core or DEVICE == "cuda"
]


def entries() -> list:
    """Parameters of the tests: each pass of each contender at each case."""
    return [
        pytest.param(case, peer.name, name, id=f"{case.op}-{case.label}-{name}-{peer.name}".replace(" ", "_"))
        for case in CASES
        for peer in [ours_as_peer(case), *PEERS]
        if case.op in peer.builders
        for name in passes_of(case)
    ]


# Tests are ordered by case, then contender, so a cache of one entry is enough.
@functools.lru_cache(maxsize=1)
def data_of(case: Case) -> CaseData:
    return CaseData.make(case, DEVICE)


@functools.lru_cache(maxsize=1)
def prepared(case: Case, contender: str) -> Entry:
    torch.compiler.reset()
    peer = next(peer for peer in [ours_as_peer(case), *PEERS] if peer.name == contender)
    if contender == "ours" and DEVICE == "cuda" and (reasons := torch_reasons(case, data_of(case).sets[0])):
        pytest.skip(f"torch computes it: {reasons}")
    return prepare(peer, data_of(case), make_clock(DEVICE, quick=True))


@pytest.mark.parametrize("case, contender, name", entries())
def test_kernel(benchmark, case: Case, contender: str, name: str) -> None:
    with torch_settings(DEVICE):
        entry = prepared(case, contender)
        outcome = entry.outcomes[name]
        if outcome.status == "WRONG" or (outcome.status != "ok" and contender == "ours"):
            pytest.fail(f"{contender} {outcome.status}: {outcome.note}")
        if outcome.status != "ok":
            pytest.skip(f"{contender} {outcome.status}: {outcome.note}")
        assert isinstance(entry.runner, LocalContender)
        benchmark.group = f"{case.op} {case.label} {name}"
        with entry.runner.context():
            step = entry.runner.step(name)

            def timed() -> None:
                step()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()

            benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
