"""Fixtures of tests of swapped models."""

import pytest

from mvlm_kernels.integrations import blocks, rotary


@pytest.fixture
def fused_calls(monkeypatch) -> list[str]:
    """Names of the ops that swapped blocks call, in order."""
    found: list[str] = []
    for module, name in ((rotary, "qk_norm_rope"), (blocks, "add_layer_norm"), (blocks, "gelu_linear")):
        op = getattr(module, name)

        def call(*args, op=op, name=name, **kwargs):
            found.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
    return found
