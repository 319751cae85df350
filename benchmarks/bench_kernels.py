"""The cases of ``mvlm bench kernels`` as pytest-benchmark entries: ``pytest benchmarks/bench_kernels.py``.

For its comparisons between saved runs (``--benchmark-autosave``, ``--benchmark-compare``). Times are the host's, the
launch included and the caches warm; the figures to quote are those of ``mvlm bench kernels``. On a CPU the main cases
run at a small size, and they are torch references. A plain ``pytest`` does not collect this file.
"""

import functools

import pytest
import torch

from mvlm_benchmarks.clock import make_clock, settings
from mvlm_benchmarks.kernels.cases import Case, cases
from mvlm_benchmarks.kernels.compare import Entry, prepare
from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.kernels.measure import Expected, Local, expect, passes_of
from mvlm_benchmarks.kernels.peers import PEERS, ours_as_peer

# Peers warn as they please (SDPA says why a backend refuses); the suite's own code turns warnings into errors.
pytestmark = pytest.mark.filterwarnings("default")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    case
    for case in cases(*((256, torch.bfloat16) if DEVICE == "cuda" else (2, torch.float32)))
    if case.core or DEVICE == "cuda"
]


def entries() -> list:
    """Every case, contender and pass; without a gradient there is a forward pass only."""
    return [
        pytest.param(case, peer.name, name, id=f"{case.op}-{case.shape}-{name}-{peer.name}".replace(" ", "_"))
        for case in CASES
        for peer in [ours_as_peer(case), *PEERS]
        if case.op in peer.builders
        for name in passes_of(case)
    ]


# Entries come case by case and contender by contender, so keeping the last of each is enough.
@functools.lru_cache(maxsize=1)
def material(case: Case) -> tuple[Inputs, Expected]:
    inputs = case.make(DEVICE)
    return inputs, expect(case, inputs)


@functools.lru_cache(maxsize=1)
def prepared(case: Case, contender: str) -> Entry:
    torch.compiler.reset()
    peer = next(peer for peer in [ours_as_peer(case), *PEERS] if peer.name == contender)
    return prepare(peer, case, *material(case), make_clock(DEVICE, quick=True), DEVICE)


@pytest.mark.parametrize("case, contender, name", entries())
def test_kernel(benchmark, case: Case, contender: str, name: str) -> None:
    with settings(DEVICE):
        entry = prepared(case, contender)
        outcome = entry.outcomes[name]
        if outcome.status == "WRONG" or (outcome.status != "ok" and contender == "ours"):
            pytest.fail(f"{contender} {outcome.status}: {outcome.note}")
        if outcome.status != "ok":
            pytest.skip(f"{contender} {outcome.status}: {outcome.note}")
        assert isinstance(entry.runs, Local)
        benchmark.group = f"{case.op} {case.shape} {name}"
        with entry.runs.context():
            step = entry.runs.step(name)

            def timed() -> None:
                step()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()

            benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
