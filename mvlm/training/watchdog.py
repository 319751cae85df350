"""A run that does not move is ended, with the stacks of its threads, rather than left hanging."""

import contextlib
import faulthandler
import os
import sys
import threading
from pathlib import Path

EXIT_CODE = 3


class Watchdog:
    """A context with a thread that ends the process when `beat` was not called for `minutes`.

    It writes the stacks of all threads to stderr and to `file`, names what was waited for, and
    ends the process with code 3 without clean-up: what hangs may hang the clean-up too. Checkpoints are safe, they are
    renamed into place when they are whole.
    """

    def __init__(self, file: Path, rank: int, minutes: float) -> None:
        self._file = file
        self._rank, self._seconds = rank, 60 * minutes
        self._interval = min(self._seconds / 10, 5.0)
        self._doing = "start"
        # Count polls, not wall-clock time: a process suspended with Ctrl-Z has not stalled.
        self._looks = self._since = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._since = self._looks
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def beat(self, doing: str) -> None:
        """The run moves; from now on it is busy with `doing`."""
        self._doing, self._since = doing, self._looks

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self._looks += 1
            waited = (self._looks - self._since) * self._interval
            if waited > self._seconds:
                self._report(waited)
                os._exit(EXIT_CODE)

    def _report(self, waited: float) -> None:
        message = (
            f"mvlm: rank {self._rank} has been waiting {waited:.0f} s for {self._doing}, more than --stall-minutes "
            f"{self._seconds / 60:g}; the run ends here. The stacks of its threads are in {self._file}; "
            f"go on from the last checkpoint with --resume"
        )
        try:
            with self._file.open("w") as file:
                file.write(message + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            message += f" (not written: {error})"
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        with contextlib.suppress(OSError):
            os.write(2, (message + "\n").encode())
