"""Prefetching on a background thread."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `make` on a thread, at most `depth` results in advance, and returns the results in order.

    The thread ends when `make` raises or returns None. After all earlier results, `get` then raises the exception or
    returns None.

    Args:
        done: called once in the thread when it ends.
    """

    def __init__(self, make: Callable[[], T | None], depth: int, done: Callable[[], None]):
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended: tuple[T | None, BaseException | None] | None = None
        self._thread = threading.Thread(target=self._run, args=(make, done), name="mvlm-loader", daemon=True)
        self._thread.start()

    def get(self) -> T | None:
        """The next result. After the end, every call gives None or raises the same exception."""
        if self._ended is None:
            result, error = self._results.get()
            if result is not None:
                self._room.release()
                return result
            self._ended = (result, error)
            self._thread.join()
        if self._ended[1] is not None:
            raise self._ended[1]
        return None

    def close(self) -> None:
        """Stop the thread after the result that it is computing, and wait for it."""
        self._stop.set()
        self._room.release()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, make: Callable[[], T | None], done: Callable[[], None]) -> None:
        last: tuple[T | None, BaseException | None] = (None, None)
        try:
            while True:
                self._room.acquire()
                if self._stop.is_set():
                    break
                result = make()
                if result is None:
                    break
                self._results.put((result, None))
                del result  # while it waits, the thread must not keep the result alive
        except BaseException as error:
            last = (None, error)
        finally:
            try:
                done()
            except BaseException as error:
                last = (None, last[1] or error)
            self._results.put(last)  # in any case, or `get` would wait for ever
