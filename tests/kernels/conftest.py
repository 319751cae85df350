"""Settings of the kernel tests: poisoned allocations for all of them, and skips without a GPU."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # also when this folder alone is asked for

import torch

from support.kernels.guards import Poison


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain_empty: leave torch.empty as it is (opcheck compares storage offsets)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0: run `make test-gpu`"))


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Fill every buffer that the library allocates with NaN, between NaN guard bands that are checked afterwards."""
    if request.node.get_closest_marker("plain_empty"):
        yield None
        return
    poison = Poison()
    monkeypatch.setattr(torch, "empty", poison.wrap(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison.wrap(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison.wrap(torch.Tensor.new_empty))
    yield poison
    poison.check()
