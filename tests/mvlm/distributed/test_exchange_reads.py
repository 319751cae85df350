"""The host reads nothing of ITC, the draws and the exchange but the numbers of rows, once, after other work."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mvlm.costs.recording import recorded_world
from mvlm.costs.step_cost import StepShape, uniform_draws
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.contrastive import Embeddings, sharded_contrastive_loss
from mvlm.distributed.exchange import FeatureExchange
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.negatives import NegativeSampling

SHAPE = StepShape(pairs=4, ranks=8, tokens=5)
LAYOUT = GlobalBatchLayout(0, 8, 1, 4)
NUMBERS = uniform_draws(SHAPE)
log: list[str] = []


class NumbersOfADevice:
    """Numbers that are on their way to the host until they are read."""

    on_the_way = True

    def __init__(self, x: Tensor) -> None:
        pass

    def read(self) -> list[list[int]]:
        """Numbers of a draw in which each row is drawn once."""
        log.append("read")
        return NUMBERS


def run(read: bool = False) -> Any:
    """Forward and backward on fake tensors, which have no values: an operation that needs one raises."""

    def leaf(*sizes: int) -> Tensor:
        return torch.empty(sizes, requires_grad=True)

    log.clear()
    with (
        recorded_world(8) as recorder,
        patch("mvlm.distributed.exchange.HostNumbers", NumbersOfADevice),
        FakeTensorMode(),
    ):
        ids = torch.empty(32, dtype=torch.int64)
        sampling = NegativeSampling(ids, ids, 0, 1)
        embeddings = Embeddings(leaf(4, 8), leaf(4, 8), LAYOUT)
        loss, _, draws = sharded_contrastive_loss(embeddings, leaf(1), sampling, LAYOUT)
        if read:
            draws.tolist()
        image, rows = leaf(4, 3, 2), leaf(20, 2)
        text = PackedText(rows, Packing(torch.empty(5, dtype=torch.int32), 5, 20))
        exchange = FeatureExchange(draws, sampling, ids, image, [text], LAYOUT, torch.bfloat16)
        exchange.join_graph()
        log.append("other work")
        exchange.start(0)
        arrived = exchange.arrive(0)
        (loss + arrived.image.sum() + arrived.text.rows.sum()).backward()
        assert image.grad is not None
        assert rows.grad is not None
        return recorder, image.grad.shape, rows.grad.shape


@pytest.mark.slow
def test_the_host_reads_the_numbers_once_and_after_other_work():
    recorder, image, rows = run()
    assert log == ["other work", "read"]
    assert (image, rows) == ((4, 3, 2), (20, 2))
    assert sum(x.kind == "all-to-all" for x in recorder.collectives) == 4


def test_another_read_would_be_noticed():
    with pytest.raises(DataDependentOutputException):
        run(read=True)
