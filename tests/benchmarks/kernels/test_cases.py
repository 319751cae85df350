"""The cases: minimum bytes by hand, peers that compute them, and inputs that two processes share."""

import pytest
import torch

import mvlm_kernels
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import prepare
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import PEERS, ours
from mvlm_benchmarks.kernels.reference import PASSES, CaseData, passes_of
from mvlm_kernels.cases import small
from support.benchmarks import FakeClock

BF16, FP32 = torch.bfloat16, torch.float32
SMALL, TWO = cases(1, FP32), cases(2, FP32)


def test_bytes_match_a_count_by_hand() -> None:
    def minimum(found, words):
        return next(c for c in found if all(word in f"{c.op} {c.label}" for word in words)).minimum

    # Attention of one image: q and out 197 rows, k and v 32 rows of 12 * 64 float32; log-sum-exp 12 * 197 float32.
    # Backward: q and the output's gradient are read and dq written; k and v are read, dk, dv written; log-sum-exp read.
    row = 12 * 64 * 4
    attention = 2 * 197 * row + 2 * 32 * row + 12 * 197 * 4, 3 * 197 * row + 4 * 32 * row + 12 * 197 * 4
    assert minimum(SMALL, ["B1 H12 D64 197x32"]) == attention
    case = next(c for c in SMALL if c.label == "B1 H12 D64 197x32")
    assert case.flops == (2 * (2 * 12 * 197 * 32 * 64), 5 * (2 * 12 * 197 * 32 * 64))
    # Keys that are shared by key_index are read once.
    assert minimum(SMALL, ["key_index"])[0] == 2 * 3 * 32 * row + 2 * 197 * row + 3 * 12 * 32 * 4 + 3 * 4
    # Two images: 116 patches of 768 bytes read, 116 ids of 4 bytes, 116 patches of 768 bfloat16 written.
    assert minimum(cases(2, BF16), ["gather", "116", "uint8"]) == (2 * (116 * 768 + 116 * 4 + 116 * 768 * 2), 0)
    # One image: 98 of 196 tokens of 768 bfloat16 read, 196 mask bytes, 199 rows of parameters, 197 of output in fp32.
    placed = 98 * 768 * 2 + 196 + 199 * 768 * 4 + 197 * 768 * 4
    assert minimum(cases(1, BF16), ["place_tokens", "float32"])[0] == placed


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=[f"{case.op} {case.label}" for case in SMALL])
def test_our_ops_pass_their_check(case) -> None:
    data = CaseData.make(case, "cpu")
    contender = LocalContender(data, [ours(case, inputs) for inputs in data.sets], FakeClock())
    outcomes = contender.check()
    assert {o.status for o in outcomes.values()} == {"ok"}, outcomes
    assert tuple(outcomes) == passes_of(case) == (PASSES if data.sets[0].leaves else PASSES[:1])
    assert not data.restore()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "gather-first", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("case", TWO, ids=lambda case: f"{case.op} {case.label}")
def test_torch_peer_computes_the_op(name, case) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    if case.op in peer.builders:
        found = prepare(peer, CaseData.make(case, "cpu"), FakeClock()).outcomes
        assert {outcome.status for outcome in found.values()} == {"ok"}


def test_every_op_with_kernels_has_a_small_case_that_launches_them() -> None:
    """The sanitizers and the first checks on a GPU see no other cases."""
    wanted = {case.op for case in cases(2, torch.bfloat16) if case.has_kernels}
    launched = {case.op for case in small(torch.bfloat16) if case.launches(90)}
    assert launched == wanted


NOT_TIMED = {"contrastive_terms", "explain", "explain_model", "pack_key_mask", "use_backend"}
"""Functions of `mvlm_kernels` that are no op, and the op that `contrastive_loss` calls."""


@pytest.mark.parametrize("quick", [False, True])
def test_every_exported_op_with_kernels_is_timed(quick) -> None:
    exported = {name for name in mvlm_kernels.__all__ if name.islower()}
    timed = {case.op for case in SMALL if case.core or not quick}
    assert timed == exported - NOT_TIMED | {"linear_cross_entropy"}
