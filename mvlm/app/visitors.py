"""Visitors of the page: which session is whose, and who still waits for an answer."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from mvlm.errors import RunError

MAX_SESSIONS = 2000
"""Sessions that are remembered, the newest. A page in a browser is one."""
MAX_WAIT = 60.0
"""Seconds after which a question is too old to be answered."""
GRACE = 3.0
"""Seconds that a browser has to open its stream of answers after it has asked."""


class Visitors:
    """Sessions by their visitors, and how many streams of answers each has open. May be used from any thread."""

    def __init__(self) -> None:
        self._visitors: OrderedDict[str, str] = OrderedDict()
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def join(self, session: str, visitor: str) -> None:
        """Note whose the session is. RunError if it is another visitor's."""
        with self._lock:
            if self._visitors.setdefault(session, visitor) != visitor:
                raise RunError("session: wanted your own, found another's; load the page again")
            self._visitors.move_to_end(session)
            while len(self._visitors) > MAX_SESSIONS:
                self._visitors.popitem(last=False)

    def owns(self, session: str, visitor: str) -> bool:
        """True if the visitor has asked something in this session."""
        with self._lock:
            return self._visitors.get(session) == visitor

    def knows(self, session: str) -> bool:
        """True if somebody has asked something in this session, lately."""
        with self._lock:
            return session in self._visitors

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Inside the block, the session has a stream of answers open."""
        with self._lock:
            self._streams[session] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[session] -= 1
                if not self._streams[session]:
                    del self._streams[session]

    def check_waiting(self, session: str, asked: float) -> None:
        """RunError if nobody waits any more for the answer to a question, or has waited for too long.

        Args:
            asked: when it was asked, by `time.monotonic`.
        """
        waited = time.monotonic() - asked
        with self._lock:
            here = self._streams[session] > 0 if session in self._streams else False
        if not here and waited > GRACE:
            raise RunError("question: wanted a visitor who waits for the answer, found none; ask again")
        if waited > MAX_WAIT:
            raise RunError(f"question: wanted an answer within {MAX_WAIT:.0f} s, the page is busy; ask again later")
