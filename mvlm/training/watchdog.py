"""Watchdog: ends a run that makes no progress, with the stacks of its threads, or one that has lost a rank."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 3
LOST_RANK_EXIT_CODE = 1
GRACE_SECONDS = 3.0
"""Time for a rank to end by itself after another one has failed."""


class Watchdog:
    """Context with a thread that ends the process if `beat` is not called for `minutes`.

    It writes the stacks of all threads to stderr and to `file`, says what the run was waiting for, and exits with code
    3. There is no clean-up, which could hang too. Checkpoints are safe, because a folder is renamed into place only
    once it is complete.

    If another rank has failed, this one may wait for it for ever. It gets a few seconds to end by itself; then the
    thread says what failed, and exits with code 1.

    Args:
        failure: asked about every second; returns the failure of a rank on one line, or None.
    """

    def __init__(self, file: Path, rank: int, minutes: float, failure: Callable[[], str | None] = lambda: None) -> None:
        self._file, self._failure = file, failure
        self._rank, self._seconds = rank, 60 * minutes
        self._interval = min(self._seconds / 10, 1.0)
        self._activity = "start"
        # Count polls, not wall-clock time: a process suspended with Ctrl-Z has not stalled.
        self._polls = self._last_beat = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last_beat = self._polls
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def beat(self, activity: str) -> None:
        """Report progress and name the next activity."""
        self._activity, self._last_beat = activity, self._polls

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self._polls += 1
            waited = (self._polls - self._last_beat) * self._interval
            if waited > self._seconds:
                self._report(waited)
                os._exit(EXIT_CODE)
            failure = self._failure()
            if failure is not None and not self._end.wait(GRACE_SECONDS):
                _write(
                    f"mvlm: rank {self._rank} was waiting for {self._activity} and ends, because another rank failed: "
                    f"{failure}; continue from the last checkpoint with --resume"
                )
                os._exit(LOST_RANK_EXIT_CODE)

    def _report(self, waited: float) -> None:
        message = (
            f"mvlm: rank {self._rank} has been waiting {waited:.0f} s for {self._activity}, more than stall_minutes "
            f"{self._seconds / 60:g}; the run ends here. The stacks of its threads are in {self._file}; "
            f"continue from the last checkpoint with --resume"
        )
        try:
            with self._file.open("w") as file:
                file.write(message + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            message += f" (not written: {error})"
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        _write(message)


def _write(message: str) -> None:
    """Write a line to stderr, whatever locks other threads hold."""
    with contextlib.suppress(OSError):
        os.write(2, (message + "\n").encode())
