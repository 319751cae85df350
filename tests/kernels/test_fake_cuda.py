"""Calls on fake CUDA tensors: traces, choices and results of a process with a GPU, up to the launch.

They have no gradients: autograd asks the device for its stream, and this torch may be built without CUDA.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mvlm_kernels import dispatch
from support.kernels.ops import REGISTERED, ROWS, Row, rows

pytestmark = pytest.mark.plain_empty
MIXED = [rows(number, mixed=True) for number in (0, 1)]  # real tensors: the cases read values


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that compiles kernels, on a machine with a GPU of compute capability 9.0."""
    dispatch.device_reasons.cache_clear()
    monkeypatch.setattr(dispatch, "arch", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with FakeTensorMode():
        yield
    dispatch.device_reasons.cache_clear()
    torch._dynamo.reset()


def on_gpu(row: Row) -> Row:
    """The row with fake tensors of a GPU."""

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    return row._replace(tensors=tuple(map(fake, row.tensors)), constants=tree_map_only(Tensor, fake, row.constants))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name != "attention, long keys"])  # indexing asks for CUDA
def test_a_compiled_gpu_call_is_one_graph_with_the_op(name: str):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ROWS[name].ours, fullgraph=True, dynamic=True, backend=backend)
    for row in (on_gpu(table[name]) for table in MIXED):
        found, eager = (tree_leaves(f(*row.tensors, **row.constants)) for f in (compiled, row.ours))
        assert [(x.shape, x.dtype, x.device.type) for x in found] == [(x.shape, x.dtype, "cuda") for x in eager]
    for graph in graphs:
        assert any(f"mvlm_kernels.{REGISTERED.get(row.op, row.op)}" in str(node.target) for node in graph.graph.nodes)
