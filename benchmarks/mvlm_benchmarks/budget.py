"""A time limit that a measurement keeps by not starting its next case, or by breaking off."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """The time is over. No `except Exception` of a library holds it back."""


class Budget:
    """Seconds from now until no new case may start. None: no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start, self._seconds = time.monotonic(), seconds
        self._longest = 0.0
        self._last: float | None = None

    @property
    def used(self) -> float:
        """Seconds since the budget began."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit; infinite without one, never negative."""
        return float("inf") if self._seconds is None else max(0.0, self._seconds - self.used)

    @contextmanager
    def until(self, end: float) -> Iterator[None]:
        """Context that raises OutOfTime when `end` seconds are used. Work in C goes on until it returns to Python.

        For the main thread.
        """

        def over(*_: object) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, 0 if end == float("inf") else max(1e-3, end - self.used))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def allows(self) -> bool:
        """True if another case may start: time is left for one as long as the longest so far.

        Call it once before each case. It takes the time since the last call as the duration of the case between.
        """
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return self.left > 0 and self.left >= min(self._longest, self._seconds or 0.0)
