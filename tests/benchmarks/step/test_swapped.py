"""Times of swapped models: the pairs return the same numbers, and a row has a ratio in its interval."""

import pytest
import torch

from mvlm_benchmarks.step import swapped


@pytest.mark.slow
@pytest.mark.parametrize("name", swapped.MODELS)
def test_original_and_swapped_are_equal(name: str):
    torch.manual_seed(0)
    original, ours = swapped.MODELS[name]()
    with torch.no_grad():
        torch.testing.assert_close(ours(), original(), rtol=1e-4, atol=1e-4)


def test_a_slower_swap_has_a_larger_ratio(monkeypatch):
    weight = torch.randn(200, 200, requires_grad=True)

    def work(times: int) -> torch.Tensor:
        return torch.stack([weight @ weight for _ in range(times)])[:1]

    monkeypatch.setattr(swapped, "MODELS", {"toy": lambda: (lambda: work(1), lambda: work(12))})
    (row,) = swapped.measure(rounds=5)
    assert row["model"] == "toy"
    assert row["gap"] == 0
    assert 2 < row["low"] <= row["ratio"] <= row["high"]
