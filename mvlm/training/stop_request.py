"""How a run is asked to end: signals and a file. The step is always finished first."""

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

SECONDS_BETWEEN_LOOKS = 1.0
AGAIN = "SIGTERM or Ctrl-C once more ends at once"


class StopRequest:
    """A context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and a file ask for the end of the run.

    The first one sets `asked`; the step is then finished and saved by the loop. After it, SIGTERM and SIGINT have their
    usual effect again, so that a second one ends the process at once. Handlers are put back on the way out.

    Args:
        file: its appearance is a notice of preemption; looked for at most once a second.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.reason: str | None = None
        """What asked, or None."""
        self._file = file
        self._looked = -SECONDS_BETWEEN_LOOKS
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # nowhere else may handlers be set
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this process has been asked to end."""
        now = time.monotonic()
        if self.reason is None and self._file is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if self._file.exists():
                self.reason = str(self._file)
        return self.reason is not None

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not by logging: the signal may have come while a log line was being written.
        with contextlib.suppress(OSError):  # `| tee` got Ctrl-C too, and is gone: the run is still to be saved
            os.write(2, f"mvlm: {self.reason}: finishing the step and saving; {AGAIN}\n".encode())
