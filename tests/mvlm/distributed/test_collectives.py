"""Journeys of rows in the autograd graph: their order in forward and backward, and the dtypes in which they travel."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mvlm.distributed.collectives import Gather, GlobalBatchLayout, InFlight, start_gather
from support.models import normal


class Logged:
    """A journey that doubles its rows, and notes when its methods are called."""

    def __init__(self, log: list[str], x: Tensor) -> None:
        self._log, self._x = log, x

    def arrive(self) -> Tensor:
        self._log.append("arrive")
        return 2 * self._x

    def start_return(self, grad: Tensor) -> None:
        self._log.append("start return")
        self._grad = 2 * grad

    def finish_return(self) -> Tensor:
        self._log.append("finish return")
        return self._grad


class Note(torch.autograd.Function):
    """The identity, which notes its forward and its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, log: list[str]) -> Tensor:
        ctx.name, ctx.log = name, log
        log.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"{ctx.name} backward")
        return grads[0], None, None


def test_work_between_departure_and_arrival_runs_during_both_journeys():
    log: list[str] = []

    def note(x: Tensor, name: str) -> Tensor:
        return Note.apply(x, name, log)  # pyright: ignore[reportReturnType]

    weight = normal(4).requires_grad_()
    encoded = note(weight * 3, "encode")
    flight = InFlight(encoded, Logged(log, encoded.detach()))
    between = note(encoded * 5, "between")
    matched = note(flight.arrive() * 7, "match")
    (between + matched).sum().backward()
    assert log == [
        "encode",
        "between",
        "arrive",
        "match",
        "match backward",
        "start return",
        "between backward",
        "finish return",
        "encode backward",
    ]
    assert weight.grad is not None
    assert weight.grad.tolist() == [3 * (5 + 7 * 2)] * 4


def test_gathered_rows_travel_in_bf16_and_their_gradients_do_not():
    layout = GlobalBatchLayout(0, 3, 2, 2)
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        x = normal(4, 5).float()
        journey = Gather(x, layout, torch.bfloat16)
        assert journey.arrive().dtype == torch.float32
        assert journey.arrive().shape == (12, 5)
        journey.start_return(torch.ones(12, 5))
        assert journey.finish_return().dtype == torch.float32
        assert start_gather(x.to(torch.bfloat16), layout).wait().dtype == torch.bfloat16
    finally:
        dist.destroy_process_group()


def test_a_world_of_one_gathers_nothing():
    x = normal(4, 5).float().requires_grad_()
    flight = InFlight(x, Gather(x, GlobalBatchLayout(0, 1, 2, 2), torch.bfloat16))
    found = flight.arrive()
    assert torch.equal(found, x)  # exact: nothing travels
    (found * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == torch.full((4, 5), 3.0).tolist()
