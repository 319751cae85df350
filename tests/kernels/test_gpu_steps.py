"""Forward and backward of every op at a working size on a CUDA device (`make test-gpu`).

Checks that need a device: the same bits in a thousand backward passes, capture in a CUDA graph that is replayed with
new inputs, by hand and by torch.compile, and no synchronisation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mvlm_kernels import (
    add_layer_norm,
    cross_attention,
    gather_patches,
    gelu_linear,
    masked_pixel_loss,
    place_tokens,
    use_backend,
)
from support.kernels.attention import Case, build, moved
from support.kernels.patches import MEAN, STD, make_ids

pytestmark = [pytest.mark.gpu, pytest.mark.plain_empty]

DEVICE = "cuda"
REPEATS = 1000


@dataclass(frozen=True)
class Step:
    """Forward and backward of one call.

    leaves get gradients. grad is the incoming gradient, ones by default. data: further inputs, one row a sample.
    """

    call: Callable[..., Tensor]
    leaves: list[Tensor]
    grad: Tensor | None = None
    data: list[Tensor] = field(default_factory=list)

    def renew(self) -> None:
        """Write other values into all inputs, where they lie."""
        with torch.no_grad():
            for x in self.leaves:
                x.copy_(torch.randn_like(x))
            for x in self.data:
                x.copy_(x.roll(1, 0) if x.ndim else x + 1)

    def __call__(self, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
        out = (call or self.call)(*self.leaves)
        if not out.requires_grad:
            return [out]
        return [out, *torch.autograd.grad(out, self.leaves, torch.ones_like(out) if self.grad is None else self.grad)]


def steps() -> Iterator[tuple[str, Step]]:
    """Every op at a working size."""

    def attention(case: Case, **options: Any) -> Step:
        made = moved(build(case), DEVICE)
        leaves = [x.detach().requires_grad_() for x in (made.q, made.k, made.v)]
        data = [x for name, x in made.kwargs.items() if not name.startswith("cu_seqlens")]  # offsets have an order
        data += [x for x in options.values() if isinstance(x, Tensor)]
        return Step(
            lambda q, k, v: cross_attention(q, k, v, **made.kwargs, **made.bounds, **options), leaves, made.grad, data
        )

    big = {"width": 64, "heads": 12, "dtype": torch.bfloat16}
    yield "short keys", attention(Case(len_q=197, len_k=40, batch=16, lengths=True, **big))
    yield "short queries", attention(Case(len_q=40, len_k=197, batch=16, **big))
    yield "split grids", attention(Case(len_q=40, len_k=577, batch=1, **big))
    yield "short keys, index", attention(Case(len_q=197, len_k=40, batch=4, readers=32, lengths=True, **big))
    yield "long keys, index", attention(Case(len_q=40, len_k=197, batch=4, readers=32, **big))
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    yield "dropout", attention(Case(len_q=197, len_k=40, batch=16, lengths=True, **big), dropout_p=0.1, seed=seed)
    yield "packed queries", attention(Case(len_q=40, len_k=197, batch=16, packed_q=True, **big))

    def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_() for shape in shapes]

    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    ids = make_ids(8, 116, 196, torch.int32).to(DEVICE)
    masked = torch.rand(8, 196, device=DEVICE) < 0.6
    # Tensors, because a sequence would be copied to the device, which a capture cannot contain.
    norm: Any = {"mean": torch.tensor(MEAN[:3], device=DEVICE), "std": torch.tensor(STD[:3], device=DEVICE)}
    yield (
        "gather_patches",
        Step(lambda x: gather_patches(x, ids, 16, **norm), leaves((8, 3, 224, 224), dtype=torch.float32), data=[ids]),
    )
    yield (
        "masked_pixel_loss",
        Step(lambda p: masked_pixel_loss(p, images, ids, 16, **norm), leaves((8, 116, 768)), data=[images, ids]),
    )
    yield (
        "place_tokens",
        Step(
            lambda *x: place_tokens(*x, masked=masked), leaves((8, 196, 768), (768,), (197, 768), (768,)), data=[masked]
        ),
    )
    yield "add_layer_norm", Step(lambda *x: add_layer_norm(*x)[1], leaves((8, 197, 768), (8, 197, 768), (768,), (768,)))
    yield "gelu_linear", Step(gelu_linear, leaves((8, 197, 3072), (768, 3072), (768,)))


NAMES = (
    "short keys", "short queries", "split grids", "short keys, index", "long keys, index", "dropout",
    "packed queries", "gather_patches", "masked_pixel_loss", "place_tokens", "add_layer_norm", "gelu_linear",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_step_gives_the_same_bits_in_every_run(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        first = step()
        for _ in range(REPEATS):
            for a, b in zip(step(), first, strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_step_is_captured_in_a_cuda_graph_and_replayed_with_new_inputs(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                wanted = [x.detach() for x in step()]  # a living graph would tie the gradients to this stream
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        for again in (False, True):
            if again:
                step.renew()
                before, wanted = wanted, [x.detach() for x in step()]
                assert not torch.equal(before[0].nan_to_num(), wanted[0].nan_to_num())
            for x in got:
                x.detach().fill_(-1)
            graph.replay()
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_step_never_waits_for_the_device(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        step()  # compiles, and copies constants to the device once
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_step_compiled_into_cuda_graphs_gives_the_eager_bits(name: str):
    """torch.compile captures the call itself. The later calls replay its graph."""
    step = dict(steps())[name]
    torch._dynamo.reset()
    compiled = torch.compile(step.call, fullgraph=True, mode="reduce-overhead")
    with use_backend("triton"):
        wanted = step()
        for _ in range(4):  # warm-up, capture, replays
            torch.compiler.cudagraph_mark_step_begin()
            for a, b in zip(step(compiled), wanted, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
    torch._dynamo.reset()
