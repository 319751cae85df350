"""Peers of every op: those of torch compute the op, and Liger says why it does not apply."""

import pytest
import torch

from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.peers import PEERS
from support.benchmarks import check_peer

CASES = cases(2, torch.float32)
BY_NAME = {peer.name: peer for peer in PEERS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "gather-first", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.op} {case.shape}" for case in CASES])
def test_torch_peer_computes_the_op(name, case) -> None:
    peer = BY_NAME[name]
    if case.op in peer.builders:
        outcomes = check_peer(peer, case)
        assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes


def test_every_op_has_an_eager_and_a_compiled_peer() -> None:
    assert set(BY_NAME["eager"].builders) == set(BY_NAME["compile"].builders) == {case.op for case in CASES}


WITHOUT_LIGER = [case for case in CASES if case.op not in ("cross_attention", "add_layer_norm", "linear_cross_entropy")]


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_LIGER, ids=lambda case: case.shape)
def test_liger_says_why_it_does_not_apply(case) -> None:
    (outcome,) = set(check_peer(BY_NAME["liger"], case).values())
    assert outcome.status == "not applicable"
    assert outcome.note.startswith("liger-kernel ")
