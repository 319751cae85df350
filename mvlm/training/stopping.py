"""Early ends of a run: a request by a signal or a file, or a watchdog.

After a request the current step is always finished. The watchdog ends a process that makes no progress, with the stacks
of its threads, or one that has lost another rank.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import open_appended

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SAME_REQUEST_SECONDS = 3.0
"""Time after the first signal in which SIGTERM is taken for the same request: torchrun passes on what it gets, after a
supervisor such as SLURM has signalled every process of the job."""


class StopRequest:
    """Context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or a file requests the end of the run.

    After a request, the training loop finishes the step and saves. With several ranks it makes one more step first,
    because requests take effect one step later (`StepExchange`). After the first signal SIGINT has its usual effect
    again, and after three more seconds SIGTERM, so that one more of them ends the process at once; SIGUSR1 never does.
    The context restores the previous handlers on exit.

    Args:
        file: its appearance is a notice of preemption. It is polled at most once a second.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.reason: str | None = None
        """Name of the signal, or path of the file, that requested the end; None without a request."""
        self._file = file
        self._polled_at = -POLL_SECONDS
        self._signalled_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """True if this process has been asked to end."""
        now = time.monotonic()
        if self._previous and self._is_old(now):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.reason is None and self._file is not None and now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            if os.path.exists(self._file):
                self.reason = str(self._file)
        return self.reason is not None

    def _is_old(self, now: float) -> bool:
        """True if the first signal came so long ago that a further SIGTERM is a request of its own."""
        return self._signalled_at is not None and now - self._signalled_at >= SAME_REQUEST_SECONDS

    def _request(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and self._signalled_at is not None:
            if self._is_old(now):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self._signalled_at is None:
            self._signalled_at = now
        self.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        message = (
            f"mvlm: {self.reason}: finishing the step and saving; Ctrl-C once more, or SIGTERM after "
            f"{SAME_REQUEST_SECONDS:.0f} seconds, ends at once"
        )
        _write(message)


EXIT_CODE = 3
LOST_RANK_EXIT_CODE = 1
GRACE_SECONDS = 3.0
"""Time for a rank to end by itself after another one has failed."""


class Watchdog:
    """Context with a thread that ends the process if `beat` is not called for some minutes.

    It writes the stacks of all threads to stderr and to `file`, says what the run was waiting for, and exits with code
    3. There is no clean-up, which could hang too. Checkpoints are safe, because a folder is renamed into place only
    once it is complete.

    If another rank has failed, this one may wait for it for ever. It gets a few seconds to end by itself; then the
    thread says what failed, and exits with code 1.

    Args:
        failure: called about every second; returns the failure of another rank on one line, or None.
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
        """Report progress, and name the activity that begins now, such as "the evaluation"."""
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
            with open_appended(self._file, within=self._file.parent) as file:
                file.truncate(0)
                file.write(f"{message}\n\n".encode())
                faulthandler.dump_traceback(file, all_threads=True)
        except (OSError, DataError) as error:
            message += f" (not written: {error})"
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        _write(message)


def _write(message: str) -> None:
    """Write a line to stderr, whatever locks are held: a signal may have interrupted a log call, which holds one."""
    with contextlib.suppress(OSError):  # Ctrl-C also ends a `| tee`; the run must be saved without it
        os.write(2, (message + "\n").encode())
