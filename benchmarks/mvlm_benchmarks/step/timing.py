"""Times and peak memory of training steps, in rounds."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.clock import require_own_timers
from mvlm_benchmarks.gpu_state import GpuState
from mvlm_benchmarks.step.activations import peak_mb
from mvlm_benchmarks.step.contenders import Contender, StepInputs
from mvlm_benchmarks.unavailable import one_line

Row = dict[str, Any]
WARM_UP = 2
"""Number of warm-up rounds, which do not count. They create optimizer state and threads, and fill caches."""
ROUND_COLUMNS = ("contender", "round", "seconds", "cpu_seconds", "loss", "note")
"""Columns of a timed step, beside the state of the GPU."""


def measure_rounds(
    ready: list[Contender],
    inputs: StepInputs,
    rounds: int,
    budget: Budget | None = None,
    timed: Callable[[Row], Any] = lambda row: None,
) -> list[Row]:
    """Measure the peak memory of each contender, then time all of them in rounds.

    A contender that runs out of memory, or raises anything else, is left out from then on.

    Args:
        budget: no round is started that would end after it. The first timed round is always made.
        timed: called with the row of each timed step, as soon as it is timed.

    Returns:
        A row of results of each contender, whose `seconds` and `cpu_seconds` have one figure per round. A contender
        that failed has a `note` and no figures.
    """
    state = GpuState(inputs.batch.images.device.type)
    rows: dict[str, Row] = {}
    failed: dict[str, Row] = {}

    def attempt(contender: Contender, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            contender.module.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            failed[contender.name] = {"contender": contender.name, "note": one_line(error)}
            timed({**failed[contender.name], **state.read()})
            return None

    for contender in ready:
        step = functools.partial(contender.backward, inputs)
        measure = functools.partial(peak_mb, step, contender.module.parameters(), inputs.batch.images.device.type)
        peak = attempt(contender, measure)
        contender.module.zero_grad(set_to_none=True)
        rows[contender.name] = {
            "contender": contender.name, "note": "", "peak_mb": peak, "seconds": [], "cpu_seconds": [],
        }  # fmt: skip
    for number in range(-WARM_UP, rounds):
        # Asked before the first timed round too, whatever it says, so that it knows how long a round takes.
        if number >= 0 and budget is not None and not budget.allows() and number > 0:
            break
        for contender in rotated(ready, number):
            if contender.name in failed:
                continue
            found = attempt(contender, functools.partial(time_step, contender, inputs))
            if found is not None and number >= 0:
                row = rows[contender.name]
                seconds, cpu_seconds, row["loss"] = found
                row["seconds"].append(seconds)
                row["cpu_seconds"].append(cpu_seconds)
                one = dict(zip(ROUND_COLUMNS, (contender.name, number, *found), strict=False))
                timed({**one, "note": "", **state.read()})
    require_own_timers()
    return [failed.get(name, row) for name, row in rows.items()]


def rotated(ready: list[Contender], number: int) -> Iterable[Contender]:
    """Contenders in the order of a round: the order rotates over the rounds."""
    return [ready[(place + number) % len(ready)] for place in range(len(ready))]


def time_step(contender: Contender, inputs: StepInputs) -> tuple[float, float, float]:
    """Time one step, from uint8 images to the optimizer's update: seconds, CPU seconds of all threads, and the loss."""
    _synchronize(inputs)
    start, cpu = time.perf_counter(), time.process_time()
    losses = contender.backward(inputs)
    contender.update()
    _synchronize(inputs)
    return time.perf_counter() - start, time.process_time() - cpu, losses.total.item()


def _synchronize(inputs: StepInputs) -> None:
    if inputs.batch.images.is_cuda:
        torch.cuda.synchronize()
