"""Overhead of logging, safety checks and checkpoints in a pretraining run.

    python -m mvlm_benchmarks.step.overhead DATA [--preset tiny] [--steps N] [--json FILE]

Runs pretraining with logging, safety and checkpoint functions timed. Times are exclusive: a nested timed function is
not counted for its caller. The run logs every step and saves every few steps. The share of checkpoints is computed for
the default interval of ten minutes, from the median time for which a save blocks the step.

Afterwards the same checkpoint is saved while nothing trains. The total time of that save is what a save without a
background thread would take.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mvlm.config.recipes import pretrain_defaults
from mvlm.device import choose_device
from mvlm.distributed.coordination import StepDecisions
from mvlm.training import trainer
from mvlm.training.metrics import MetricsLogger
from mvlm.training.run import pretrain
from mvlm.training.stop_request import StopRequest
from mvlm.training.trainer import Trainer
from mvlm.training.watchdog import Watchdog
from mvlm_benchmarks.machine import describe
from mvlm_benchmarks.results import write_json

STEP, SAVE = "step", "save"
TIMED_FUNCTIONS: dict[str, list[tuple[Any, str]]] = {
    # gradient_norms also computes the total norm, which clipping needs anyway. Its time is not separated here.
    "logging": [(MetricsLogger, "end_row"), (MetricsLogger, "write_row"), (trainer, "gradient_norms")],
    "safety": [
        (trainer, "finite_on_all_ranks"),
        (Trainer, "check_skipped_updates"),
        (Watchdog, "beat"),
        (StepDecisions, "decide"),
        (StopRequest, "requested"),
    ],
    SAVE: [(Trainer, "save")],
    STEP: [(Trainer, "one_step")],
}
WARM_UP = 5
SAVE_EVERY = 8
CHECKPOINT_MINUTES = 10
"""Default time between checkpoints."""


class CallTimer:
    """Exclusive seconds of every call of the timed functions: nested timed functions are not counted for the caller."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {name: [] for name in TIMED_FUNCTIONS}
        self._nested: list[float] = []
        """Seconds in nested timed functions, for each running timed function."""

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that each call appends its exclusive time to `calls[name]`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._nested.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.calls[name].append(took - self._nested.pop())
                if self._nested:
                    self._nested[-1] += took

        return call


@contextmanager
def timed_functions(timer: CallTimer) -> Iterator[None]:
    """Time the functions of TIMED_FUNCTIONS inside this context."""
    with ExitStack() as stack:
        for name, functions in TIMED_FUNCTIONS.items():
            for owner, function in functions:
                stack.enter_context(patch.object(owner, function, timer.timed(name, getattr(owner, function))))
        yield


def measure(data: Path, preset: str, steps: int) -> dict[str, float]:
    """Run pretraining and measure the overhead. Returns milliseconds and shares of a step by name."""
    timer, runs = CallTimer(), []
    one_step = Trainer.one_step

    def step_and_wait(run: Any, batches: Any) -> None:
        runs[:] = [run]
        if run.step == WARM_UP:
            for calls in timer.calls.values():
                calls.clear()
        one_step(run, batches)
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise logging waits for the step, and that time counts as logging

    with tempfile.TemporaryDirectory(prefix="mvlm-overhead-") as folder:
        config = replace(
            pretrain_defaults(preset, data, Path(folder) / "run"),
            max_steps=WARM_UP + steps,
            warmup_steps=WARM_UP,
            checkpoint_every_steps=SAVE_EVERY,
        )
        with patch.object(Trainer, "one_step", step_and_wait), timed_functions(timer):
            pretrain(config)
        run = runs[0]
        alone = []
        for _ in range(5):
            began = time.perf_counter()
            run.save()
            run.writer.wait()
            alone.append(time.perf_counter() - began)
    calls = timer.calls
    step = statistics.median(calls[STEP])
    logging, safety = (sum(calls[name]) / len(calls[STEP]) for name in ("logging", "safety"))
    stall, whole = statistics.median(calls[SAVE]), statistics.median(alone)
    return {
        "step_ms": 1e3 * step,
        "logging_ms": 1e3 * logging,
        "safety_ms": 1e3 * safety,
        "save_stall_ms": 1e3 * stall,
        "save_whole_ms": 1e3 * whole,
        "logging_share": logging / step,
        "safety_share": safety / step,
        "save_share": stall / (60 * CHECKPOINT_MINUTES),
        "together_share": (logging + safety) / step + stall / (60 * CHECKPOINT_MINUTES),
        "stall_over_whole": stall / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.step.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("--preset", default="tiny", help="recipe: tiny, small or base")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    figures = measure(arguments.data, arguments.preset, arguments.steps)
    for name, value in figures.items():
        print(f"{name:<18}{value:10.3f}" if name.endswith("ms") else f"{name:<18}{100 * value:9.2f} %")
    if arguments.json:
        about = describe(choose_device("auto").type, ["numpy", "nvidia-dali-cuda130", "safetensors"])
        write_json({"machine": about, **figures}, arguments.json)


if __name__ == "__main__":
    main()
