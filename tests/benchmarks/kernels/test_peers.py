"""Peers compute the op, or say what they miss."""

import sys

import pytest
import torch

from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import prepare
from mvlm_benchmarks.kernels.inputs import Case
from mvlm_benchmarks.kernels.measure import Outcome
from mvlm_benchmarks.kernels.peers import PEERS, Peer
from mvlm_benchmarks.kernels.reference import CaseData
from support.benchmarks import FakeClock

CASES = cases(2, torch.float32)
ATTENTION = [case for case in CASES if case.op == "cross_attention" and "577" not in case.shape]
BY_NAME = {peer.name: peer for peer in PEERS}
NEEDS_CUDA = Outcome("missing", "needs a CUDA device")


def outcomes_of(peer: Peer, case: Case) -> set[Outcome]:
    """Outcomes of a peer's passes at a case on the CPU."""
    return set(prepare(peer, CaseData.make(case, "cpu"), FakeClock()).outcomes.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "gather-first", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.op} {case.shape}" for case in CASES])
def test_torch_peer_computes_the_op(name, case) -> None:
    if case.op in BY_NAME[name].builders:
        assert outcomes_of(BY_NAME[name], case) == {Outcome("ok")}


@pytest.mark.parametrize(
    "name, package", [("xformers", "xformers"), ("flash-attn-2", "flash_attn"), ("flash-attn-4", "flash_attn")]
)
def test_library_that_is_not_installed_is_missing(name, package, monkeypatch) -> None:
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    (outcome,) = outcomes_of(BY_NAME[name], ATTENTION[0])
    assert (outcome.status, package in outcome.note) == ("missing", True)
