"""A stage of measurements: folder, budget, files that grow, and a summary that says how the stage ended."""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvlm_benchmarks import gpu_state, machine
from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.clock import WrongValue
from mvlm_benchmarks.gpu_state import GpuState
from mvlm_benchmarks.results import RowFile
from mvlm_benchmarks.unavailable import one_line
from mvlm_dataloading.files import write_json

Row = dict[str, Any]
COMPLETE, INCOMPLETE, OUT_OF_TIME, RUNNING = "complete", "incomplete", "out of time", "running, or killed"


class Stopped(BaseException):
    """The process was asked to end. Not an Exception, so that no measurement takes it for its own failure."""


@dataclass
class Stage:
    """One run of a stage.

    Files in `out`: NAME.csv and other tables, which grow row by row; NAME.log, what was printed; NAME.json, machine,
    settings, and how the stage ended.
    """

    name: str
    out: Path
    budget: Budget
    rehearse: bool
    """Small shapes on a CPU, where Triton interprets the kernels. Figures mean nothing."""
    quick: bool = False
    """True for a part of stage `first`: only the measurements that are worth most are made."""
    about: dict[str, Any] = field(default_factory=dict)
    state: GpuState = field(default_factory=lambda: GpuState("cpu"))
    finished: list[str] = field(default_factory=list)
    """Parts of the stage that gave their results."""
    without_result: dict[str, str] = field(default_factory=dict)
    """Parts that were begun and gave none, or not all, with the status that says why."""
    left_out: str = ""
    """The first part that did not fit into the budget."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float32 in a rehearsal, because CPUs multiply it faster."""
        return torch.float32 if self.rehearse else torch.bfloat16

    @property
    def batch(self) -> int:
        """Number of images of each benchmark case."""
        return 2 if self.rehearse else 256

    def table(self, name: str, columns: Sequence[str]) -> RowFile:
        """Start NAME.csv. It also gets the columns of the GPU's state and of the machine."""
        return RowFile(self.out / f"{name}.csv", self.about, [*columns, *gpu_state.COLUMNS])

    def say(self, text: str) -> None:
        """Print a text, and append it to the log."""
        print(text, flush=True)
        with (self.out / f"{self.name}.log").open("a") as file:
            file.write(text + "\n")

    def allows(self, part: str) -> bool:
        """True if another part may start. Says so if it may not."""
        if self.budget.allows():
            return True
        self.leave_out(part)
        return False

    def end_part(self, part: str, *statuses: str) -> None:
        """Note that a part has ended, with the statuses of its rows. It is finished if all are "ok"."""
        bad = [status for status in statuses if status != "ok"]
        if bad:
            self.without_result[part] = bad[0]
        else:
            self.finished.append(part)

    def leave_out(self, part: str) -> None:
        """Note that a part, and those behind it, did not fit into the budget."""
        self.left_out = part
        self.say(f"out of time after {self.budget.used:.0f} s: {part} and what follows were left out")

    def summary(self, ended: str, **more: Any) -> None:
        """Write NAME.json: how the stage ended, its time, and the status of its parts."""
        content = {
            "stage": self.name,
            "ended": ended,
            "seconds": round(self.budget.used, 1),
            "rehearsal": self.rehearse,
        }
        content |= {"finished": self.finished, "without_result": self.without_result}
        content |= {"no_gpu_state": self.state.problem, **more, "machine": self.about}
        write_json(self.out / f"{self.name}.json", content)


@contextlib.contextmanager
def running(name: str, out: Path, seconds: float, rehearse: bool, quick: bool = False) -> Iterator[Stage]:
    """Run a stage inside the block: start its files, and write how it ended, whatever happens.

    Raises:
        SystemExit: 1 after a wrong value or an error, 3 after SIGTERM or SIGINT. All rows are in the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    stage = Stage(name, out, Budget(seconds), rehearse, quick)
    (out / f"{name}.log").write_text("")
    stage.about = machine.describe(stage.device, DISTRIBUTIONS)
    if rehearse:
        stage.about["figures"] = "rehearsal on a CPU: the figures mean nothing"
    stage.state = GpuState(stage.device)
    stage.summary(RUNNING)
    stage.say(f"{name}: {stage.about['device']}, torch {stage.about['torch']}, triton {stage.about['triton']}, "
              f"at most {seconds:.0f} s")  # fmt: skip

    def stop(number: int, _: Any) -> None:
        for other in handlers:  # a terminal's Ctrl-C comes twice, once from gpu_run.py; what follows writes files
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    ended, code = COMPLETE, 0
    try:
        try:
            yield stage
        except WrongValue as error:
            ended, code = f"wrong value: {error}", 1
        except Stopped as error:
            ended, code = f"stopped by {error}", 3
        except Exception as error:
            import traceback

            stage.say(traceback.format_exc())
            ended, code = f"error: {one_line(error)}", 1
        if ended == COMPLETE and stage.left_out:
            ended = f"{OUT_OF_TIME}, before {stage.left_out}"
        elif ended == COMPLETE and stage.without_result:
            ended = f"{INCOMPLETE}: " + ", ".join(f"{part} {why}" for part, why in stage.without_result.items())
        stage.summary(ended)
        stage.say(f"{name}: {ended} after {stage.budget.used:.0f} s; files in {out}")
    finally:
        for number, handler in handlers.items():  # last: a second Ctrl-C would cut the summary short
            signal.signal(number, handler)
    if code:
        sys.exit(code)


DISTRIBUTIONS = [
    "torch", "triton", "numpy", "timm", "transformers", "matplotlib", "nvidia-ml-py", "xformers", "flash-attn",
    "liger-kernel", "quack-kernels",
]  # fmt: skip
