"""CUDA graphs of a step, with a capture that needs no GPU: it repeats the step into the same tensors.

What only a device can show, equal losses of captured steps, is in tests/promises/test_gpu.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.objectives.losses import Losses
from mvlm.training.cuda_graphs import CudaGraphs, check_graphs
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.gelu_linear.room import save
from support.models import ALONE, micro_batch, pretrain_config


class Recorder:
    """A capture on the CPU. Like a graph it keeps the outputs' and gradients' memory, and sees only its own inputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.captures, self.replays = model, 0, 0

    def __call__(self, function: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
        self.captures += 1
        outputs = function()
        gradients = [p.grad for p in self.model.parameters()]

        def replay() -> None:
            self.replays += 1
            for p in self.model.parameters():
                p.grad = None
            for name, new in function().items():
                outputs[name].copy_(new)
            for own, p in zip(gradients, self.model.parameters(), strict=True):
                assert (own is None) == (p.grad is None)
                if own is not None and p.grad is not None:
                    own.copy_(p.grad)
                p.grad = None

        # A capture runs nothing: until the first replay its outputs mean nothing.
        for x in (*outputs.values(), *gradients):
            if x is not None:
                x.fill_(torch.nan)
        return replay, outputs


def refused(function: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
    function()  # gradients are set when the capture ends with an error
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.slow
def test_a_trainer_that_replays_steps_or_captures_none_trains_as_eager(start, caplog):
    """Eight steps: the metrics, learning rates and weights of eager steps, those of earlier steps too."""
    rows, weights = [], []
    for way in ("eager", "replayed", "refused"):
        trainer, batches = start(capture="cuda-graphs")
        recorder = Recorder(trainer.model)
        if way != "eager":
            capture = recorder if way == "replayed" else refused
            trainer.graphs = CudaGraphs(trainer.forward_backward, trainer.model.parameters(), capture)
        for _ in range(8):
            trainer.one_step(batches)
        rows.append(trainer.metrics.read())
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        assert (recorder.replays > 1) == (way == "replayed")
    assert rows[0] == rows[1] == rows[2]
    for p, *others in zip(*weights, strict=True):
        assert all(torch.equal(p, q) for q in others)
    assert "operation not permitted when stream is capturing" in caplog.text


def test_steps_save_no_gelu():
    """A graph would hold it for good."""
    saved: list[bool] = []

    def step(microbatches: list[tuple[Batch, Masks]], number: torch.Tensor) -> Losses:
        saved.append(save(torch.ones(1))[0])
        return Losses(total=torch.zeros(()))

    model = torch.nn.Linear(1, 1)
    recorder = Recorder(model)
    graphs = CudaGraphs(step, model.parameters(), recorder)
    batch, masks = micro_batch()
    for _ in range(3):
        graphs.run([(batch, masks)], torch.zeros((), dtype=torch.int64))
    assert recorder.replays
    assert not any(saved)
    assert save(torch.ones(1))[0]


def test_a_run_that_cannot_take_graphs_hears_why(tmp_path):
    config = pretrain_config(tmp_path, tmp_path, capture="cuda-graphs")
    cuda = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))
    check_graphs(config, cuda)
    again = replace(config, checkpoint_activations=True)
    for refused, world in (
        (config, replace(cuda, device=ALONE.device)),
        (config, replace(cuda, size=2)),
        (again, cuda),
    ):
        with pytest.raises(ConfigError, match=r"^capture: "):
            check_graphs(refused, world)
