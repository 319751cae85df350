"""CUDA graphs of a step, with a capture that needs no GPU: it repeats the step into the same tensors.

What only a device can show, equal losses of captured steps, is in tests/promises/test_gpu.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.model.packing import pad_to_bucket
from mvlm.objectives.losses import Losses
from mvlm.training.cuda_graphs import CudaGraphs, check_graphs
from support.models import ALONE, micro_batch, micro_model, pretrain_config

LENGTHS = [(7, 4, 12, 3), (5, 4, 6, 9), (12, 12, 12, 12), (3, 3, 3, 4)]


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
            for own, new in zip(outputs, function(), strict=True):
                own.copy_(new)
            for own, p in zip(gradients, self.model.parameters(), strict=True):
                assert (own is None) == (p.grad is None)
                if own is not None and p.grad is not None:
                    own.copy_(p.grad)
                p.grad = None

        # A capture runs nothing: until the first replay its outputs mean nothing.
        for x in (*outputs, *gradients):
            if x is not None:
                x.fill_(torch.nan)
        return replay, outputs


def backward_step(model) -> Callable[..., Losses]:
    def step(batch, masks, number) -> Losses:
        losses = model(batch, masks, step=number, plan="fast")
        losses.total.backward()
        return Losses(*(loss.detach() for loss in losses))

    return step


def batches(model, lengths):
    for seed, own in enumerate(lengths):
        batch, masks = micro_batch(own, config=model.config)
        batch = replace(batch, images=(batch.images + 31 * seed).to(torch.uint8))
        yield pad_to_bucket(batch, masks, model.config.text_length)


def train(model, steps, run: Callable[..., Losses]) -> list[Losses]:
    """Losses of SGD steps. Gradients are changed in place and dropped, as the trainer does."""
    found = []
    for number, (batch, masks) in enumerate(steps):
        found.append(run(batch, masks, torch.tensor(number)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
                    p.grad = None
    return found


@pytest.mark.slow
def test_replayed_steps_train_as_eager_ones():
    order = [LENGTHS[i] for i in (0, 0, 1, 1, 0, 1, 2, 0, 2, 2, 1, 0)]
    wanted_model, model = micro_model(), micro_model()
    wanted = train(wanted_model, batches(wanted_model, order), backward_step(wanted_model))
    recorder = Recorder(model)
    graphs = CudaGraphs(backward_step(model), model.parameters(), recorder)
    got = train(model, batches(model, order), graphs.run)
    assert recorder.captures == graphs.captured > 1
    assert recorder.replays > recorder.captures
    for a, b in zip(got, wanted, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)  # those of earlier steps too: later replays do not change them
    for p, q in zip(model.parameters(), wanted_model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_steps_stay_eager_after_a_capture_that_failed(caplog):
    wanted_model, model = micro_model(), micro_model()
    order = [LENGTHS[0]] * 4
    wanted = train(wanted_model, batches(wanted_model, order), backward_step(wanted_model))

    def capture(function):
        function()  # gradients are set when the capture ends with an error
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(backward_step(model), model.parameters(), capture)
    got = train(model, batches(model, order), graphs.run)
    assert graphs.captured == 0
    assert "operation not permitted when stream is capturing" in caplog.text
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.total, b.total)


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


@pytest.mark.slow
def test_the_trainer_replays_its_steps(start):
    """Eight steps: the metrics, learning rates and weights of eager steps."""
    rows, weights = [], []
    for replayed in (False, True):
        trainer, batches = start(capture="cuda-graphs")
        recorder = Recorder(trainer.model)
        if replayed:
            trainer.graphs = CudaGraphs(trainer.backward_alone, trainer.model.parameters(), recorder)
        for _ in range(8):
            trainer.one_step(batches)
        rows.append(trainer.metrics.read())
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        assert (recorder.replays > 1) == replayed
    assert rows[0] == rows[1]
    for p, q in zip(*weights, strict=True):
        assert torch.equal(p, q)
