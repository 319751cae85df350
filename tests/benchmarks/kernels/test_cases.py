"""The cases: minimum bytes by hand and against the kernels' own cases, and inputs that two processes share."""

import pytest
import torch

from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.measure import PASSES, LocalContender, passes_of, run_reference, tolerance
from mvlm_benchmarks.kernels.peers import ours
from mvlm_kernels import cases as kernel_cases
from support.benchmarks import FakeClock

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = cases(1, FP32)


def names(found) -> list[str]:
    return [f"{case.op} {case.shape}" for case in found]


def test_bytes_of_attention_match_a_count_by_hand() -> None:
    """One image: q and out 197 rows, k and v 32 rows of 12 * 64 float32; log-sum-exp 12 * 197 float32."""
    case = next(c for c in SMALL if c.shape == "B1 H12 D64 197x32")
    row = 12 * 64 * 4
    forward = 197 * row + 32 * row + 32 * row + 197 * row + 12 * 197 * 4
    # q and the output's gradient are read and dq written; k and v are read, dk and dv written; log-sum-exp is read.
    assert case.minimum == (forward, 3 * 197 * row + 4 * 32 * row + 12 * 197 * 4)
    assert case.flops == (2 * (2 * 12 * 197 * 32 * 64), 5 * (2 * 12 * 197 * 32 * 64))


def test_keys_shared_by_key_index_are_read_once() -> None:
    case = next(c for c in SMALL if "key_index" in c.shape)
    row = 12 * 64 * 4
    assert case.minimum[0] == 2 * 3 * 32 * row + 2 * 197 * row + 3 * 12 * 32 * 4 + 3 * 4


def test_bytes_of_gather_patches_match_a_count_by_hand() -> None:
    """Two images: 116 patches of 768 bytes read, 116 ids of 4 bytes, 116 patches of 768 bfloat16 written."""
    case = next(c for c in cases(2, BF16) if c.op == "gather_patches" and "116" in c.shape and "uint8" in c.shape)
    assert case.minimum == (2 * (116 * 768 + 116 * 4 + 116 * 768 * 2), 0)


def test_cases_agree_with_those_of_the_kernels() -> None:
    """At the paper's sizes both packages count the same."""
    here = {(case.op, case.shape): case for case in cases(256, BF16)}
    for theirs in kernel_cases.cases():
        found = here[theirs.op, theirs.shape]
        assert found.minimum == theirs.minimum(theirs.sizes), theirs.shape
        assert found.flops == theirs.flops(theirs.sizes), theirs.shape


@pytest.mark.parametrize("case", SMALL, ids=names(SMALL))
def test_our_ops_pass_their_check(case) -> None:
    inputs = case.make("cpu")
    expected = run_reference(case, inputs)
    contender = LocalContender(case, inputs, ours(case, inputs), expected.incoming, FakeClock())
    outcomes = contender.check(expected, tolerance(case, "cpu"))
    assert {o.status for o in outcomes.values()} == {"ok"}, outcomes
    assert tuple(outcomes) == passes_of(case) == (PASSES if inputs.leaves else PASSES[:1])


def test_inputs_of_a_case_are_the_same_every_time() -> None:
    for first, second in zip(SMALL, cases(1, FP32), strict=True):
        a, b = first.make("cpu"), second.make("cpu")
        for left, right in ((a.leaves, b.leaves), (a.fixed, b.fixed)):
            for name, value in left.items():
                equal = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
                assert equal, f"{first.op} {first.shape} {name}"
