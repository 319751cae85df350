"""Progress of a run or of other long work: a bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mvlm.terminal import say

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0
"""Without a terminal, lines are at least this far apart."""
STEPS_OF_AN_ESTIMATE = 20
"""Steps of training after which an estimate of the time left is shown."""


class _Bar:
    """Context in which a progress bar is drawn, if a subclass has made one."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


class TrainingProgress(_Bar):
    """A context that shows rows of metrics while training runs from step `first` to step `last`, with the time left.

    The time left is estimated from the mean time of a step since the first row, evaluations included.

    With `shown=False`, as on all ranks but the first, it shows nothing.
    """

    def __init__(self, first: int, last: int, shown: bool = True) -> None:
        super().__init__()
        self._last, self._shown = last, shown
        self._last_line = -float("inf")
        self._first, self._estimated = first, False
        self._since = first, time.monotonic()
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task("", total=last, completed=first)

    def show(self, row: dict[str, Any], losses: Iterable[str]) -> None:
        """Show a row of metrics, with those of `losses` that it has, or else its loss and accuracy.

        Without a terminal, print a line every 20 seconds, at evaluations, at the end, and with the first estimate.
        """
        now, step, text = time.monotonic(), row["step"], describe_row(row, losses)
        enough = step - self._first >= STEPS_OF_AN_ESTIMATE
        if not enough and self._since[0] == self._first:
            # The first step is slower than the others: processes start, and kernels are compiled.
            self._since = step, now
        if enough and step < self._last:
            before, then = self._since
            text = f"{format_duration((now - then) / (step - before) * (self._last - step))} left  {text}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            return
        if not self._shown:
            return
        evaluated = "tr_r1" in row or any(name.startswith("val_") for name in row)
        first_estimate = enough and not self._estimated
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._last or evaluated or first_estimate:
            self._estimated = enough
            self._last_line = now
            try:
                say(f"step {step}/{self._last}  {text}", flush=True)
            except OSError as error:  # a full disk, or a closed pipe: no reason to lose a run
                log.warning("could not write to standard output: %s; nothing more is shown, training continues", error)
                _discard_output(sys.stdout)


def _discard_output(stream: TextIO) -> None:
    """Discard all further output to a stream, and what is still in its buffer, by pointing it to /dev/null."""
    # Without this, the interpreter writes the buffer at exit, fails again, and exits with an error code.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class WorkProgress(_Bar):
    """A context that shows how much of some work is done, with its rate and the time left.

    Args:
        unit: plural noun of the units that are counted, such as "samples".
        short: without a terminal, show nothing of work that takes less than 20 seconds.
    """

    def __init__(self, unit: str, short: bool = False) -> None:
        super().__init__()
        self._unit = unit
        self._start = time.monotonic()
        self._first: int | None = None
        self._last_line = self._start if short else -float("inf")
        self._silent = short
        if sys.stdout.isatty():
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=None)

    def show(self, done: int, total: int, count: int) -> None:
        """Show that `done` of `total` parts and `count` units are done.

        Without a terminal, print a line every 20 seconds and at the end.
        """
        now = time.monotonic()
        if self._first is None:
            # The work of an earlier run says nothing about the speed of this one.
            self._first, self._start = done, now
        seconds, parts = now - self._start, done - self._first
        line = f"{count:,} {self._unit}"
        if seconds > 0 and count:
            line += f"  {count / seconds:.0f} {self._unit}/s"
        if parts and done < total:
            line += f"  {format_duration(seconds / parts * (total - done))} left"
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=line)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or (done == total and not self._silent):
            self._last_line, self._silent = now, False
            say(f"{done}/{total}  {line}", flush=True)


def format_duration(seconds: float) -> str:
    """Seconds in at most two units: "7 s", "1 min 1 s", "1 h 2 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def describe_row(row: dict[str, Any], losses: Iterable[str]) -> str:
    """Losses and speed of a row of metrics, with undecodable images, skipped updates and evaluation, if any."""
    names = [name for name in losses if name in row] or ("loss", "accuracy")
    parts = [f"{name} {row[name]:.3f}" for name in names if row.get(name) is not None]
    parts.append(f"{row['pairs_per_s']:.0f} pairs/s")
    if row["skipped"]:
        parts.append(f"{row['skipped']} undecodable images")
    if row.get("bad_steps"):
        parts.append(f"{row['bad_steps']} skipped updates")
    if "tr_r1" in row:
        parts.append(f"validation R@1 {_number(row['tr_r1'])} / {_number(row['ir_r1'])}")
        parts.append(f"gain {_number(row['gain_text_nats'], 2)} nats, {_number(row['gain_pixels_pct'])} %")
    if "classes_top1" in row:
        parts.append(f"classes {_number(row['classes_top1'])} %")
    parts += [f"validation {name.removeprefix('val_')} {_number(row[name])}" for name in row if name.startswith("val_")]
    return "  ".join(parts)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
