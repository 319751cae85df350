"""The cases: minimum bytes by hand and against the kernels' own cases, and inputs that two processes share."""

import pytest
import torch

from mvlm_benchmarks.kernels.attention_cases import drawn_index
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import PASSES, CaseData, passes_of
from mvlm_kernels import cases as kernel_cases
from support.benchmarks import FakeClock

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = cases(1, FP32)
OURS = [case for case in SMALL if case.ours is not None]


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
    """At the paper's sizes both packages count the same, where both have the case."""
    here = {(case.op, case.shape): case for case in cases(256, BF16)}
    shared = [theirs for theirs in kernel_cases.cases() if (theirs.op, theirs.shape) in here]
    assert len(shared) >= 10
    for theirs in shared:
        found = here[theirs.op, theirs.shape]
        assert found.minimum == theirs.minimum(theirs.sizes), theirs.shape
        assert found.flops == theirs.flops(theirs.sizes), theirs.shape


@pytest.mark.slow
@pytest.mark.parametrize("case", OURS, ids=names(OURS))
def test_our_ops_pass_their_check(case) -> None:
    data = CaseData.make(case, "cpu")
    contender = LocalContender(data, [ours(case, inputs) for inputs in data.sets], FakeClock())
    outcomes = contender.check()
    assert {o.status for o in outcomes.values()} == {"ok"}, outcomes
    assert tuple(outcomes) == passes_of(case) == (PASSES if data.sets[0].leaves else PASSES[:1])
    assert not data.restore()


@pytest.mark.parametrize("case", OURS, ids=names(OURS))
def test_seeds_change_values_and_nothing_else(case) -> None:
    """Peers make masks and index tensors of one set of inputs. They must fit the others."""
    first, second = case.make("cpu"), case.make("cpu", 1)
    values = {id(x) for inputs in (first, second) for x in inputs.values()}
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b) == (id(a) not in values)


def test_cases_have_names_of_their_own() -> None:
    for found in (SMALL, cases(256, BF16)):
        assert len({(case.op, case.shape) for case in found}) == len(found)


def test_core_cases_come_first() -> None:
    core = [case.core for case in SMALL]
    assert core == sorted(core, reverse=True)


def test_cases_of_a_training_step_are_there() -> None:
    shapes = " | ".join(names(cases(256, BF16)))
    for wanted in (
        "B512 H12 D64 197x197", "B512 H12 D64 32x32, packed self-attention of captions",
        "B256 H12 D64 1x32, captions as keys, packed, 3 query sequences per key sequence on average, drawn",
        "half of 196 masked, parameters in float32", "l1, uint8 images, parameters in float32",
    ):  # fmt: skip
        assert wanted in shapes


def test_drawn_index_has_favourites_and_every_caption_twice() -> None:
    index = drawn_index(768, 256)
    readers = torch.bincount(index.long(), minlength=256)
    assert (len(index), int(readers.min()), int(index.max())) == (768, 2, 255)
    assert 10 <= int(readers.max()) <= 64
    assert torch.equal(index, drawn_index(768, 256))


def test_float32_parameters_are_counted_with_four_bytes() -> None:
    """place_tokens of one image: 98 of 196 tokens of 768 bfloat16 read, 196 mask bytes, 199 rows of parameters and
    197 rows of output in float32."""
    case = next(c for c in cases(1, BF16) if c.op == "place_tokens" and "float32" in c.shape)
    assert case.minimum[0] == 98 * 768 * 2 + 196 + 199 * 768 * 4 + 197 * 768 * 4


def test_inputs_of_a_case_are_the_same_every_time() -> None:
    for first, second in zip(SMALL, cases(1, FP32), strict=True):
        a, b = first.make("cpu"), second.make("cpu")
        for left, right in ((a.leaves, b.leaves), (a.fixed, b.fixed)):
            for name, value in left.items():
                equal = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
                assert equal, f"{first.op} {first.shape} {name}"
