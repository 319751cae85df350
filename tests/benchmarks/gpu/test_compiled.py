"""The compiled forms of the fast step: what is compiled on a GPU, and with the settings of training."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mvlm.model import attention
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.gpu import compiled
from mvlm_benchmarks.step.contenders import make_contenders, make_inputs
from support.benchmarks import micro_config


@pytest.fixture
def limit() -> Iterator[None]:
    """torch's own limit of recompilations, restored after the test."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not:DeprecationWarning")
def test_all_feed_forward_layers_are_compiled_with_the_choices_of_a_gpu(monkeypatch, limit) -> None:
    """On a GPU biases are added later, and blocks with post-norm call `branch` and not the module."""
    monkeypatch.setattr("mvlm.model.attention.adds_bias_later", lambda _: True)
    model = MaskVLM(micro_config(cross_norm="post"))
    inputs = make_inputs(model, np.array([3, 5, 4, 7]), torch.device("cpu"))
    calls, graphs = [], []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return gelu_linear(*arguments, **options)

    def backend(graph: Any, _: Any) -> Any:
        return lambda *arguments: (graphs.append(1), graph(*arguments))[1]

    gelu_linear = attention.gelu_linear
    with monkeypatch.context() as patch:
        patch.setattr(attention, "gelu_linear", counted)
        with torch.no_grad():
            wanted = compiled.eager(model).losses(inputs)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with torch.no_grad():
        found = compiled.by_region(model).losses(inputs)
    torch.compiler.reset()
    assert len(graphs) == len(calls) > 4
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-5)
    assert torch._dynamo.config.recompile_limit >= 64  # a step of `base` has nine shapes, torch's limit is 8


def test_whole_step_is_compiled_as_in_training(monkeypatch, limit) -> None:
    given = {}
    monkeypatch.setattr(torch, "compile", lambda module, **options: given.update(options))
    make_contenders(("fast-compiled",), MaskVLM(micro_config()), optimizer=False)
    assert given == {"fullgraph": True, "dynamic": False}
    assert torch._dynamo.config.recompile_limit >= 64
