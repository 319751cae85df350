"""One thread that makes things before they are asked for."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `make` in a thread, up to `depth` results ahead, and hands the results over in order.

    An exception of `make` is raised by `get` in its turn, after all results before it, and ends the thread; so does a
    result None, which `get` returns. `done` is called at the end, in the thread.
    """

    def __init__(self, make: Callable[[], T | None], depth: int, done: Callable[[], None]):
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended: tuple[T | None, BaseException | None] | None = None
        self._thread = threading.Thread(target=self._run, args=(make, done), name="mvlm-loader", daemon=True)
        self._thread.start()

    def get(self) -> T | None:
        """The next result. What ended the thread is given again and again."""
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
        """End the thread, whatever it is at, and wait for it."""
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
                del result  # or the thread would hold on to it while it waits
        except BaseException as error:
            last = (None, error)
        finally:
            done()
            self._results.put(last)
