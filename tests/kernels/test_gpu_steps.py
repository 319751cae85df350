"""Forward and backward of every op at a working size on a CUDA device (`make test-gpu`).

Checks that need a device: the same bits in a thousand backward passes, capture in a CUDA graph that is replayed with
new inputs, by hand and by torch.compile, and no synchronisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mvlm_kernels import cases, use_backend
from mvlm_kernels.case import Case, as_results
from mvlm_kernels.cross_attention.cases import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.plain_empty]

DEVICE = "cuda"
REPEATS = 1000


@dataclass(frozen=True)
class Step:
    """Forward and backward of one call.

    leaves get gradients. grads: of the outputs. data: further inputs, one row a sample.
    """

    call: Callable[..., tuple[Tensor, ...]]
    leaves: list[Tensor]
    data: list[Tensor]
    grads: list[Tensor] = field(default_factory=list)

    def renew(self) -> None:
        """Write other values into all inputs, where they lie."""
        with torch.no_grad():
            for x in self.leaves:
                x.copy_(torch.randn_like(x))
            for x in self.data:
                x.copy_(x.roll(1, 0) if x.ndim else x + 1)

    def __call__(self, call: Callable[..., tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        outs = (call or self.call)(*self.leaves)
        if not self.leaves:
            return list(outs)
        if not self.grads:
            self.grads.extend(torch.randn_like(out) for out in outs)
        return [*outs, *torch.autograd.grad(outs, self.leaves, self.grads)]


def step_of(case: Case) -> Step:
    inputs, ours = case.make(DEVICE), case.ours
    fixed, names = dict(inputs.fixed), list(inputs.leaves)
    data = [x for name, x in fixed.items() if isinstance(x, Tensor) and not name.startswith("cu_seqlens")]
    for name in ("mean", "std"):  # a sequence would be copied to the device, which a capture cannot contain
        if name in fixed:
            fixed[name] = torch.tensor(fixed[name], device=DEVICE)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return as_results(ours(**dict(zip(names, leaves, strict=True)), **fixed))

    return Step(call, list(inputs.leaves.values()), data)


BIG = {"width": 64, "heads": 12, "dtype": torch.bfloat16}
CASES = {f"{case.op} {case.label}"[:80]: case for case in cases.timed(8, torch.bfloat16) if not case.left_to_torch}
CASES["split grids"] = Shape(len_q=40, len_k=577, batch=1, **BIG).case("")
CASES["dropout"] = Shape(len_q=197, len_k=40, batch=16, lengths=True, dropout=True, **BIG).case("")


@pytest.mark.parametrize("name", CASES)
def test_step_gives_the_same_bits_in_every_run(name: str):
    step = step_of(CASES[name])
    with use_backend("triton"):
        first = step()
        for _ in range(REPEATS):
            for a, b in zip(step(), first, strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", CASES)
def test_step_is_captured_in_a_cuda_graph_and_replayed_with_new_inputs(name: str):
    step = step_of(CASES[name])
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


@pytest.mark.parametrize("name", CASES)
def test_step_never_waits_for_the_device(name: str):
    step = step_of(CASES[name])
    with use_backend("triton"):
        step()  # compiles, and copies constants to the device once
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CASES)
def test_step_compiled_into_cuda_graphs_gives_the_eager_bits(name: str):
    """torch.compile captures the call itself. The later calls replay its graph."""
    step = step_of(CASES[name])
    torch._dynamo.reset()
    compiled = torch.compile(step.call, fullgraph=True, mode="reduce-overhead")
    with use_backend("triton"):
        wanted = step()
        for _ in range(4):  # warm-up, capture, replays
            torch.compiler.cudagraph_mark_step_begin()
            for a, b in zip(step(compiled), wanted, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
    torch._dynamo.reset()
