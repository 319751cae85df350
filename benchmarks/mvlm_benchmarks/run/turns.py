"""Time a step by itself and the same step in the real training loop, in turns, in one process and on one model."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from unittest.mock import patch

import torch

from mvlm.device import autocast
from mvlm.model.shadow_weights import using
from mvlm.training.run import make_loader
from mvlm.training.trainer import Trainer, with_few_shapes
from mvlm_benchmarks.run.usage import Usage, read_usage, usage_between
from mvlm_dataloading import Batch, Masks

STEP, NO_LOADER, LOOP = "step", "run, no loader", "run, no evaluation"
CONTENDERS = (STEP, NO_LOADER, LOOP)
"""step: forward, backward and optimizer on batches in memory. run, no loader: `Trainer.train` on the same batches, with
the guard, clipping, metrics and logs. run, no evaluation: the same with the loader's batches."""
WARM_UP = 1
"""Rounds that do not count."""
SETTLE_S = 0.3
"""Pause before a turn. The loader then has prepared its batches and is idle."""
LEAD = 2
"""Steps at the beginning of a turn that do not count: the loader prepared their batches in the pause."""

Loaded = tuple[Batch, Masks]


class Turns:
    """Takes the place of `Trainer.one_step`: divides a run into turns of the loop and turns of a step alone.

    A round is one turn of each of CONTENDERS, in an order that rotates. The step alone and the loop without the loader
    repeat the batches of the last turn with the loader, because the number of tokens differs from batch to batch.

    Args:
        batches: batches to begin with, `LEAD + length` of them.
        length: steps of a turn that count.
        rounds: rounds that count.
    """

    _before: Usage
    """Counters after the steps of the current turn that do not count."""

    def __init__(self, batches: Sequence[Loaded], length: int, rounds: int) -> None:
        self._batches, self._counted, self._length = batches, length, LEAD + length
        self._order = [
            CONTENDERS[(place + number) % len(CONTENDERS)]
            for number in range(rounds + WARM_UP)
            for place in range(len(CONTENDERS))
        ]
        self._one_step = Trainer.one_step
        self._turn = ""
        self._left = 0
        self._source: Iterator[Loaded] = iter(())
        self.rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        """Figures per step of each turn (`usage_between`), by contender."""

    @property
    def steps(self) -> int:
        """Steps that the run needs: one more than those of the loop's turns, to end the last one."""
        return self._length * sum(name != STEP for name in self._order) + 1

    def one_step(self, trainer: Trainer, batches: Iterator[Loaded]) -> None:
        """Make one step of the loop. Before the first step of a turn, make the turns of the step alone."""
        if self._left == 0:
            self._end_turn(trainer)
            while self._order and self._order[0] == STEP:
                self._begin_turn(trainer)
                for number, (batch, masks) in enumerate(self._batches):
                    if number == LEAD:
                        self._begin_counting(trainer)
                    bare_step(trainer, batch, masks)
                self._end_turn(trainer)
            self._source = batches
            if self._order:  # else this is the last step
                self._begin_turn(trainer)
                self._source = iter(self._batches) if self._turn == NO_LOADER else self._recorded(batches)
            self._left = self._length
        if self._turn and self._left == self._counted:
            self._begin_counting(trainer)
        self._left -= 1
        self._one_step(trainer, self._source)

    def _recorded(self, batches: Iterator[Loaded]) -> Iterator[Loaded]:
        """Yield the batches unchanged, and record those of one turn for the turns that follow."""
        recorded = list[Loaded]()
        for loaded in batches:
            recorded.append(loaded)
            if len(recorded) == self._length:
                self._batches = recorded
            yield loaded

    def _begin_turn(self, trainer: Trainer) -> None:
        trainer.writer.wait()
        _wait_for_device(trainer)
        time.sleep(SETTLE_S)
        self._turn = self._order.pop(0)

    def _begin_counting(self, trainer: Trainer) -> None:
        _wait_for_device(trainer)
        self._before = read_usage()

    def _end_turn(self, trainer: Trainer) -> None:
        if self._turn:
            _wait_for_device(trainer)  # the loop has queued its last step; the bare step has waited for its own
            self.rows[self._turn].append(usage_between(self._before, read_usage(), self._counted))
        self._turn = ""


def _wait_for_device(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def bare_step(trainer: Trainer, batch: Batch, masks: Masks) -> None:
    """One step as `mvlm bench step` times it: forward, backward and optimizer, with a learning rate of 0."""
    config = trainer.config
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.optimizer.found_inf = None
    [(batch, masks)] = with_few_shapes([(batch, masks)], config, trainer.world)
    with using(trainer.shadows):
        with autocast(trainer.device, config.precision):
            losses = trainer.model(batch, masks, seed=config.seed, step=trainer.step, plan=config.plan)
        losses.total.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    losses.total.item()


def measure_turns(
    trainer: Trainer, batches: Sequence[Loaded], length: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Train, in turns. Returns the figures of the turns that count, per step, by contender."""
    turns = Turns(batches, length, rounds)
    assert turns.steps == trainer.config.max_steps, (turns.steps, trainer.config.max_steps)
    with patch.object(Trainer, "one_step", lambda trainer, batches: turns.one_step(trainer, batches)):
        trainer.train()
    return {name: rows[WARM_UP:] for name, rows in turns.rows.items()}


def first_batches(trainer: Trainer, count: int) -> list[Loaded]:
    """The first batches of a run."""
    config = replace(trainer.config, keep_images_mb=0)
    loader = make_loader(trainer.loader.dataset, trainer.tokenizer, config, trainer.world)
    with closing(loader):
        return list(itertools.islice(loader, count))
