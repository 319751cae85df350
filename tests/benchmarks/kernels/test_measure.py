"""Checks and passes of one contender."""

import torch

from mvlm_benchmarks.kernels.checks import relative_error, same_bits
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.reference import CaseData
from support.benchmarks import FakeClock, toy_case

TOY = toy_case()


def contender(function, clock=None) -> LocalContender:
    data = CaseData.make(TOY, "cpu")
    return LocalContender(data, [function] * len(data.sets), clock or FakeClock())


def test_backward_pass_reuses_one_forward() -> None:
    """The forward of `backward` runs before the timed calls; `both` runs forward every time."""
    calls = []

    def counted(x):
        calls.append(1)
        return x * 2

    local = contender(counted)
    for name, forwards, results_of_one in (("forward", 3, 1), ("backward", 1, 1), ("both", 3, 2)):
        calls.clear()
        step = local.step(name)
        results = [step() for _ in range(3)]
        assert len(calls) == forwards
        assert len(results[0]) == results_of_one
        assert torch.equal(results[0][-1], results[2][-1])


def test_every_set_of_inputs_is_timed_as_modified() -> None:
    """Between two calls the clock prepares, and inputs then count as modified."""
    seen = []
    local = contender(lambda x: seen.append((x.detach()[-1].item(), x._version)) or x * 2)
    local.time("forward")
    local.time("forward")
    assert {value for value, _ in seen} == {1.0, 2.0}  # the last value of each set
    for value in (1.0, 2.0):
        versions = [version for found, version in seen if found == value]
        assert versions[-1] > versions[0]


def test_relative_error_is_over_the_largest_wanted_value() -> None:
    wanted = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -4.0]), wanted) == 0
    assert relative_error(torch.tensor([1.0, -3.0]), wanted) == 0.25
    assert relative_error(torch.tensor([1.0]), wanted) == float("inf")
    assert relative_error(torch.tensor([1.0, float("inf")]), wanted) == float("inf")


def test_bits_are_compared_and_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
