"""Requests to end a run: signals and a file. The current step is always finished first."""

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SAME_REQUEST_SECONDS = 3.0
"""Time after the first signal in which SIGTERM is taken for the same request: torchrun passes on what it gets, after a
supervisor such as SLURM has signalled every process of the job."""


class StopRequest:
    """Context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or a file requests the end of the run.

    After a request, the training loop finishes the step and saves. With several ranks it makes one more step first,
    because requests take effect one step later (`StepDecisions`). After the first signal SIGINT has its usual effect
    again, and after three more seconds SIGTERM, so that one more of them ends the process at once; SIGUSR1 never does.
    The context restores the previous handlers on exit.

    Args:
        file: its appearance is a notice of preemption. It is polled at most once a second.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.reason: str | None = None
        """Signal or file that made the request, or None."""
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
        """True if the first signal is so old that a further SIGTERM is another request."""
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
            f"{SAME_REQUEST_SECONDS:.0f} seconds, ends at once\n"
        )
        # Not by logging: the signal may have interrupted a log call, which holds a lock.
        with contextlib.suppress(OSError):  # Ctrl-C also ends a `| tee`; the run must be saved without it
            os.write(2, message.encode())
