"""Calls on fake CUDA tensors: traces, choices and results of a process with a GPU, up to the launch.

They have no gradients: autograd asks the device for its stream, and this torch may be built without CUDA.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm_kernels import (
    cross_attention,
    dispatch,
    explain,
    gather_patches,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
)

pytestmark = pytest.mark.plain_empty
BF16: Any = {"dtype": torch.bfloat16, "device": "cuda"}


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


def attention(batch: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = [(batch, 197, 3, 64), (batch, keys, 3, 64), (batch, keys, 3, 64)]
    return [torch.empty(s, dtype=dtype, device="cuda") for s in shapes]


def pixels(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.empty(batch, 3, 32, 32, dtype=torch.uint8, device="cuda")
    return images, torch.empty(batch, count, dtype=torch.int32, device="cuda")


def calls(batch: int, count: int) -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    images, ids = pixels(batch, count)
    norm: Any = {"mean": [0.5] * 3, "std": [0.25] * 3}
    lengths = torch.empty(batch, dtype=torch.int32, device="cuda")
    tokens = [torch.empty(s, **BF16) for s in ((batch, 16, 8), (8,), (17, 8), (8,))]
    pred = torch.empty(batch, count, 192, **BF16)
    head = [torch.empty(s, **BF16) for s in ((batch, count, 24), (192, 24), (192,))]
    return {
        "cross_attention": (lambda q, k, v: cross_attention(q, k, v, key_lengths=lengths), attention(batch, count)),
        "gather_patches": (lambda x: gather_patches(x, ids, 8, **norm), [torch.empty(batch, 3, 32, 32, **BF16)]),
        "masked_pixel_loss": (lambda p: masked_pixel_loss(p, images, ids, 8, **norm), [pred]),
        "linear_pixel_loss": (lambda h, w, b: linear_pixel_loss(h, w, b, images, ids, 8, **norm), head),
        "place_tokens": (place_tokens, tokens),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", ["cross_attention", "gather_patches", "masked_pixel_loss", "linear_pixel_loss", "place_tokens"]
)
def test_compiled_gpu_call_is_one_graph_with_the_op(op: str):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    sizes = torch.compile(lambda call, x: call(*x), fullgraph=True, dynamic=True, backend=backend)
    for batch, count in ((2, 5), (3, 7)):
        call, tensors = calls(batch, count)[op]
        out = sizes(call, tensors)
        assert out.shape == call(*tensors).shape
        assert out.is_cuda
    for graph in graphs:
        assert any(f"mvlm_kernels.{op}" in str(node.target) for node in graph.graph.nodes)


def test_eager_calls_on_a_gpu_take_the_kernels():
    for op, (call, tensors) in calls(2, 5).items():
        out = call(*tensors)
        assert out.device.type == "cuda", op
    assert explain(cross_attention, *attention(2, 5)).backend == "triton"


@pytest.mark.slow
def test_float32_attention_without_tf32_is_sdpa_inside_the_graph(monkeypatch: pytest.MonkeyPatch):
    # SDPA asks the device which of its backends to take, so a stand-in shows that it is called.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: q.tan())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(cross_attention, fullgraph=True, dynamic=True, backend=backend)
    tensors = attention(2, 5, torch.float32)
    assert compiled(*tensors).shape == tensors[0].shape
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if "tan" in str(node.target)] == ["tan"]
    assert "float32_matmul_precision" in explain(cross_attention, *tensors).reasons[0]
