"""Fixtures of tests of swapped models."""

import pytest

from mvlm_kernels.integrations import blocks


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """Names of the ops that swapped blocks call, in order."""
    found: list[str] = []
    for name in ("add_layer_norm", "gelu_linear"):
        op = getattr(blocks, name)

        def call(*args, op=op, name=name, **kwargs):
            found.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(blocks, name, call)
    return found
