"""What logging, safety and checkpoints cost a pretraining step, and how long a save keeps the step waiting.

    python -m mvlm_benchmarks.step.overhead DATA [--preset tiny] [--steps N] [--json FILE]

A real run, with the functions that do these things timed where they stand (time spent in one inside another counts for
the inner one alone). It logs every step and saves every few; what a save would cost at the default of one in ten
minutes is computed from its median. Then the same checkpoint is saved with nobody training: the whole time of that is
what a save without a thread would take.
"""

import argparse
import json
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

from mvlm import train
from mvlm.agreement import Wishes
from mvlm.device import choose_device
from mvlm.monitor import Lines
from mvlm.pretrain_config import pretrain_defaults
from mvlm.safety import Guard
from mvlm.signals import StopRequest
from mvlm.watchdog import Watchdog
from mvlm_benchmarks.machine import describe

STEP, SAVE = "step", "save"
FUNCTIONS: dict[str, list[tuple[Any, str]]] = {
    # The norm of all gradients is needed for clipping; those by part of the model are not told apart from it here.
    "logging": [(Lines, "close"), (Lines, "write"), (train, "gradient_norms")],
    "safety": [(Guard, "judge"), (train.Run, "check"), (Watchdog, "beat"), (Wishes, "grant"), (StopRequest, "asked")],
    SAVE: [(train.Run, "save")],
    STEP: [(train.Run, "one_step")],
}
WARM_UP = 5
SAVE_EVERY = 8
MINUTES = 10
"""Between checkpoints, by default."""


class Clock:
    """Seconds spent in each kind of function since `begin`, a list of calls' own times for each."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
        self._inside: list[float] = []
        """Of the functions that are running: seconds spent in others that they called."""

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose own time is added to the calls of `name`."""

        def call(*arguments: Any, **settings: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                took = time.perf_counter() - began
                self.calls[name].append(took - self._inside.pop())
                if self._inside:
                    self._inside[-1] += took

        return call


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Inside, the functions are timed."""
    with ExitStack() as stack:
        for name, functions in FUNCTIONS.items():
            for owner, function in functions:
                stack.enter_context(patch.object(owner, function, clock.timed(name, getattr(owner, function))))
        yield


def measure(data: Path, preset: str, steps: int) -> dict[str, float]:
    """Milliseconds and shares, by name (`main` prints them)."""
    clock, kept = Clock(), []
    one_step = train.Run.one_step

    def keep(run: Any, batches: Any) -> None:
        kept[:] = [run]
        if run.step == WARM_UP:
            for calls in clock.calls.values():
                calls.clear()
        one_step(run, batches)
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # or the next line of the log would wait for the step, and be blamed for it

    with tempfile.TemporaryDirectory(prefix="mvlm-overhead-") as folder:
        config = replace(
            pretrain_defaults(preset, data, Path(folder) / "run"),
            max_steps=WARM_UP + steps,
            warmup_steps=WARM_UP,
            checkpoint_every_steps=SAVE_EVERY,
        )
        with patch.object(train.Run, "one_step", keep), watched(clock):
            train.pretrain(config)
        run = kept[0]
        alone = []
        for _ in range(5):
            began = time.perf_counter()
            run.save()
            run.saver.wait()
            alone.append(time.perf_counter() - began)
    calls = clock.calls
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
        "save_share": stall / (60 * MINUTES),
        "together_share": (logging + safety) / step + stall / (60 * MINUTES),
        "stall_over_whole": stall / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.step.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.data, arguments.preset, arguments.steps)
    for name, value in found.items():
        print(f"{name:<18}{value:10.3f}" if name.endswith("ms") else f"{name:<18}{100 * value:9.2f} %")
    if arguments.json:
        about = describe(choose_device("auto").type, ["numpy", "nvidia-dali-cuda130", "safetensors"])
        arguments.json.write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
