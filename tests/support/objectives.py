"""An objective against explicit loops, in every kind of step."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import parallelize
from mvlm.distributed.world import World, join_ranks
from mvlm.model import plain
from mvlm.model.implementation import Streams
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import step
from mvlm.objectives.pretraining import ALL, MLM
from mvlm.objectives.step import Objective
from mvlm.training.metrics import full_tensor
from support.faults.forks import ended_well, in_ranks
from support.microbatches import pieces, whole_batch
from support.models import ALONE, micro_model

NOISE: dict[str, Any] = {"seed": 3, "step": 5}
ROWS_OF_LOGITS = 3
"""Rows of logits in memory at a time, where a check splits them."""
Loop = Callable[[MaskVLM, Streams], Sequence[Tensor | float]]


def shallow_model() -> MaskVLM:
    """A micro model with one layer in each encoder but the cross-modality ones."""
    return micro_model(image_layers=1, text_layers=1, decoder_layers=1)


def check_against_loops(objective: Objective, loop: Loop) -> None:
    """Check an objective's loss, accuracies and gradients, beside MLM, and beside the paper's four.

    On one rank by both implementations, and with microbatches; on two ranks with DDP and FSDP2, with and without
    microbatches; and alone on two ranks. Where there are microbatches, logits come in blocks of rows.

    Args:
        loop: returns the loss and the accuracies of `whole_batch()`, from a model and its streams, in float64. It
            shares no code with the objective.
    """
    beside_mlm, beside_all, alone = (_expected(objective, others, loop) for others in ((MLM(),), ALL, ()))
    for plan, wanted in (("plain", beside_mlm), ("fast", beside_all)):
        model = shallow_model()
        losses = model(*whole_batch(), **NOISE, plan=plan, objectives=wanted.objectives)
        losses.total.backward()
        wanted.check(losses, model)
    _check_parallel(ALONE, "ddp", 4, "fast", beside_all)

    def work() -> None:
        world = join_ranks("cpu")
        _check_parallel(world, "ddp", 1, "fast", beside_all)
        _check_parallel(world, "ddp", 2, "plain", beside_mlm)
        _check_parallel(world, "ddp", 1, "fast", alone)
        _check_parallel(world, "fsdp", 2, "fast", beside_all)
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, 2)] == [True] * 2


@dataclass
class _Expected:
    """Losses of one rank on the whole batch, and the gradients of their total."""

    objectives: Sequence[Objective]
    losses: dict[str, float]
    gradients: dict[str, Tensor | None]

    def check(self, found: dict[str, Tensor], model: MaskVLM) -> None:
        assert {name: x.item() for name, x in found.items()} == pytest.approx(self.losses, abs=1e-10)
        for name, parameter in model.named_parameters():
            # No gradient is one of zero: some steps need one of every parameter.
            grad, wanted = parameter.grad, self.gradients[name]
            grad = torch.zeros(parameter.shape) if grad is None else full_tensor(grad)
            wanted = torch.zeros(parameter.shape) if wanted is None else wanted
            torch.testing.assert_close(grad.double(), wanted.double(), rtol=0, atol=1e-10, msg=name)


def _expected(objective: Objective, others: Sequence[Objective], loop: Loop) -> _Expected:
    model, (batch, masks) = shallow_model(), whole_batch()
    losses: dict[str, Any] = dict(model(batch, masks, **NOISE, objectives=others)) if others else {"total": 0.0}
    loss, *accuracies = loop(model, plain.encode(model, batch, masks))
    total = losses["total"] + objective.weight * loss
    total.backward()
    losses |= dict(zip((objective.name, *objective.accuracies), (loss, *accuracies), strict=True)) | {"total": total}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return _Expected((*others, objective), {name: torch.as_tensor(x).item() for name, x in losses.items()}, gradients)


def _check_parallel(world: World, kind: Any, microbatches: int, plan: Any, wanted: _Expected) -> None:
    model, micro = shallow_model(), pieces(world, microbatches)
    with ExitStack() as stack:
        if microbatches > 1:
            stack.enter_context(patch.object(step, "MAX_LOGITS", ROWS_OF_LOGITS * len(whole_batch()[0].images)))
        parallel = parallelize(model, world, kind, nodes=1)
        found = backward_global(parallel, micro, world, **NOISE, plan=plan, objectives=wanted.objectives)
    wanted.check(found, model)
