"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0


class TrainingProgress:
    """A context that shows one row of metrics after another, from step `first` to step `last`."""

    def __init__(self, first: int, last: int, shown: bool = True) -> None:
        self._last, self._shows = last, shown
        self._shown = -float("inf")
        self._bar: Bar | None = None
        if shown and sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task("", total=last, completed=first)

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Show a line of metrics; without a terminal one every 20 seconds, the last step and every evaluation."""
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=describe(row))
            return
        now = time.monotonic()
        if not self._shows:
            return
        if now - self._shown >= SECONDS_BETWEEN_LINES or row["step"] == self._last or "tr_r1" in row:
            self._shown = now
            try:
                print(f"step {row['step']}/{self._last}  {describe(row)}", flush=True)
            except OSError as error:  # a full disk, or a reader that has gone: no reason to lose a run
                log.warning("could not write to standard output: %s; it shows nothing more, training goes on", error)
                _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Let what is written to it go nowhere, also what it still holds and would write at the exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class WorkProgress:
    """A context that shows how far some work is, with its rate and an estimate of what is left."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._began = time.monotonic()
        self._first: int | None = None
        self._shown = -float("inf")
        self._bar: Bar | None = None
        if sys.stdout.isatty():
            self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "WorkProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, total: int, count: int) -> None:
        """`done` of `total` parts and `count` units; without a terminal a line every 20 seconds and at the end."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now  # what an earlier run did says nothing of this one's speed
        seconds, since = now - self._began, done - self._first
        words = f"{count:,} {self._unit}"
        if seconds > 0 and count:
            words += f"  {count / seconds:.0f} {self._unit}/s"
        if since and done < total:
            words += f"  {duration(seconds / since * (total - done))} left"
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=words)
        elif now - self._shown >= SECONDS_BETWEEN_LINES or done == total:
            self._shown = now
            print(f"{done}/{total}  {words}", flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them, of two units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def describe(row: dict[str, Any]) -> str:
    """Losses, speed and, where there are any, evaluation figures of a line of metrics."""
    words = [f"{name} {row[name]:.3f}" for name in ("mlm", "mim", "itc", "itm") if row[name] is not None]
    words.append(f"{row['pairs_per_s']:.0f} pairs/s")
    if row["skipped"]:
        words.append(f"{row['skipped']} skipped")
    if row.get("bad_steps"):
        words.append(f"{row['bad_steps']} bad steps")
    if "tr_r1" in row:
        words.append(f"validation R@1 {row['tr_r1']:.1f} / {row['ir_r1']:.1f}")
        words.append(f"gain {row['gain_text_nats']:.2f} nats, {row['gain_pixels_pct']:.1f} %")
    return "  ".join(words)
