"""Checks and passes of one contender."""

import torch

from mvlm_benchmarks.kernels.measure import LocalContender, relative_error, run_reference
from support.benchmarks import FakeClock, toy_case

TOY = toy_case()


def test_backward_pass_reuses_one_forward() -> None:
    """The forward of `backward` runs before the timed calls; `both` runs forward every time."""
    inputs, calls = TOY.make("cpu"), []

    def counted(x):
        calls.append(1)
        return x * 2

    local = LocalContender(TOY, inputs, counted, run_reference(TOY, inputs).incoming, FakeClock())
    for name, forwards in (("forward", 3), ("backward", 1), ("both", 3)):
        calls.clear()
        step = local.step(name)
        results = [step() for _ in range(3)]
        assert len(calls) == forwards
        if name != "forward":
            assert torch.equal(results[0][0], results[2][0])
    assert inputs.leaves["x"].grad is None


def test_relative_error_is_over_the_largest_wanted_value() -> None:
    wanted = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -4.0]), wanted) == 0
    assert relative_error(torch.tensor([1.0, -3.0]), wanted) == 0.25
    assert relative_error(torch.tensor([1.0]), wanted) == float("inf")
    assert relative_error(torch.tensor([1.0, float("inf")]), wanted) == float("inf")
