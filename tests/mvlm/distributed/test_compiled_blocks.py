"""Steps whose blocks are compiled one by one, against eager steps: on ranks, with microbatches and checkpoints."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pytest
import torch

from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import checkpoint_activations, compile_step, parallelize
from mvlm.distributed.world import World, join_ranks
from mvlm.objectives.pretraining import ALL, ITC
from mvlm.objectives.step import Objective
from mvlm.training.metrics import gradient_norms
from mvlm_dataloading import Batch, Masks
from support.faults.forks import in_ranks, wait
from support.models import ALONE, micro_batch, micro_config, micro_model

# Dynamo asks tensors of closures for their `.grad`, and hides the warning unless warnings are errors. Inductor imports
# deprecated parts of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def varied(steps: int, rank: int) -> Iterator[tuple[Batch, Masks]]:
    """Batches of four captions of 4 to 11 tokens, other ones on each rank."""
    rng = np.random.default_rng(rank)
    for number in range(steps):
        yield micro_batch(tuple(map(int, rng.integers(4, 12, 4))), seed=1000 * rank + number)


def train(
    world: World,
    steps: int,
    backend: str | None,
    *,
    accumulate: int = 1,
    checkpointed: bool = False,
    kind: Literal["ddp", "fsdp"] = "ddp",
    objectives: Sequence[Objective] = ALL,
) -> tuple[np.ndarray, list[int]]:
    """Losses and the gradient's norm of each step, in float64, and the number of graphs after it.

    The model is not updated. Without a backend the steps are eager.
    """
    torch._dynamo.reset()
    model = micro_model(image_layers=2, text_layers=2, cross_layers=1, decoder_layers=1)
    if backend is not None:
        compile_step(model, world, accumulate, checkpointed, backend=backend)
    if checkpointed:
        checkpoint_activations(model)
    parallel = parallelize(model, world, kind)
    figures, graphs, batches = [], [], varied(steps * accumulate, world.rank)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(steps):
        model.zero_grad()
        micro = [next(batches) for _ in range(accumulate)]
        losses = backward_global(parallel, micro, world, seed=0, step=step, plan="fast", objectives=objectives)
        figures.append([*map(float, losses.values()), float(gradient_norms(model)[0])])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    return np.array(figures), graphs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.extended)])
def test_compiled_encoders_learn_as_eager_ones_at_all_lengths(backend):
    """Two blocks of each encoder share a graph, and another length needs at most one more."""
    how = {"checkpointed": True, "objectives": [ITC(1.0)]}
    wanted, _ = train(ALONE, 8, None, **how)
    got, graphs = train(ALONE, 8, backend, **how)
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert 2 <= graphs[2] == graphs[-1] <= 4


@pytest.mark.slow
def test_blocks_are_compiled_at_the_first_step_of_a_stage_alone():
    """Images of three sides, three steps each. The second compiles for all sizes, so the third needs nothing."""
    torch._dynamo.reset()
    model, eager = (micro_model(image_layers=2, text_layers=2, cross_layers=1, decoder_layers=1) for _ in range(2))
    compile_step(model, ALONE, 1, True, backend="aot_eager")
    losses, graphs = ([], []), []
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for side in (48, 16, 32):
        config = micro_config(image_size=side, image_layers=2, text_layers=2, cross_layers=1, decoder_layers=1)
        for step in range(3):
            batch, masks = micro_batch((7, 4 + step, 12, 3), seed=step, config=config)
            for found, one in zip(losses, (model, eager), strict=True):
                with one.at(config):
                    total = one(batch, masks, plan="fast", objectives=[ITC(1.0)]).total
                    total.backward()
                found.append(total.item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    np.testing.assert_allclose(*losses, rtol=1e-10)
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None
            np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, err_msg=name)
    assert 0 < graphs[2] < graphs[3] == graphs[-1] <= 8


@pytest.mark.extended
@pytest.mark.slow
def test_no_block_is_compiled_again_in_200_steps():
    _, graphs = train(ALONE, 200, "aot_eager", accumulate=2)
    assert 0 < graphs[9] == graphs[-1] <= 30


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_blocks_of_ranks_learn_as_eager_ones(kind, ranks, tmp_path):
    """Two microbatches with checkpointed activations: gradient caching, and all hooks, around the blocks."""
    log = tmp_path / "log"

    def work() -> None:
        world, how = join_ranks("cpu"), {"accumulate": 2, "checkpointed": True, "kind": kind}
        wanted, none = train(world, 2, None, **how)
        got, graphs = train(world, 2, "aot_eager", **how)
        assert none[-1] == 0 < graphs[-1]
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)

    assert [wait(pid) for pid in in_ranks(work, ranks, log)] == [0] * ranks, log.read_text()
