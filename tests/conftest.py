"""Fixtures and hooks of the whole suite."""

import os

import pytest

# Triton decides at import whether it interprets, so one process either interprets kernels or compiles them. The suite
# interprets: it needs no GPU, and ops on CPU tensors still take torch unless a test asks for Triton. Tests that compile
# start their own process. `make test-gpu` sets TRITON_INTERPRET=0 and runs the gpu tests alone.
os.environ.setdefault("TRITON_INTERPRET", "1")

# OpenMP reads this when torch is imported. By default threads that wait for one another spin. If other processes keep
# the cores busy, as with `pytest -n 2`, a run on two threads then takes up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` unless kernels are compiled and there is a device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0: run `make test-gpu`"))


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write no TensorBoard events, which take longer than a micro model's steps."""
    import mvlm.training.loggers

    class Board:
        def __init__(self, *_, **__): ...

        def add_scalar(self, *_): ...

        def add_image(self, *_, **__): ...

        def close(self): ...

    monkeypatch.setattr(mvlm.training.loggers, "SummaryWriter", Board)
