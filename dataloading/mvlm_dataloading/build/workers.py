"""A process pool that survives the death of a worker."""

import contextlib
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from mvlm_dataloading.errors import DataError


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """Event of a task.

    `kind` is "progress" (value: reported count), "done" (value: result) or "died" (value: exit code of its process).
    """

    kind: str
    task: Any
    value: Any = None
    process: int | None = None
    """Id of the process that died."""


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    task: Any = None
    begun: bool = False
    """False while the process starts, which imports the program that called."""


def run_tasks(function: Callable[..., Any], tasks: Iterable[Any], workers: int) -> Generator[TaskEvent, Any, None]:
    """Call `function(task, report)` for each task in worker processes, and yield events as they occur.

    An exception of a task is raised here and ends the pool. A task whose process died is not retried automatically. To
    retry it, call `generator.send(task)` on its "died" event.

    Args:
        function: must be picklable. It calls its second argument with counts of work done.
        workers: number of processes; 0 runs the tasks in this process.

    Raises:
        DataError: a worker fails to import the program that called, as it does a script that calls outside of
            ``if __name__ == "__main__":``.
    """
    if workers == 0:
        for task in tasks:
            counts: list[int] = []
            result = function(task, counts.append)
            yield TaskEvent("progress", task, sum(counts))
            yield TaskEvent("done", task, result)
        return
    waiting, returned = iter(tasks), []
    pool: list[_Worker] = []
    try:
        while True:
            while len(pool) < workers or any(worker.task is None for worker in pool):
                task = returned.pop() if returned else next(waiting, None)
                if task is None:
                    break
                worker = next((one for one in pool if one.task is None), None)
                if worker is None:
                    worker = _start_worker(function)
                    pool.append(worker)
                worker.task = task
                with contextlib.suppress(OSError):  # a dead worker is noticed below
                    worker.connection.send(task)
            busy = [worker for worker in pool if worker.task is not None]
            if not busy:
                return
            for worker in _ready(busy):
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    pool.remove(worker)
                    worker.process.join()
                    if not worker.begun and worker.process.exitcode == 1:
                        raise DataError(
                            "worker processes: wanted a program that they can import, found one that fails (the trace "
                            "is above); put a script's calls under `if __name__ == '__main__':`, or choose 0 workers"
                        ) from None
                    again = yield TaskEvent("died", worker.task, worker.process.exitcode, worker.process.pid)
                    if again is not None:
                        returned.append(again)
                        yield TaskEvent("progress", again, 0)  # the event that `send` returns
                    continue
                if kind == "failed":
                    raise value
                if kind == "begun":
                    worker.begun = True
                    continue
                task = worker.task
                if kind == "done":
                    worker.task = None
                yield TaskEvent(kind, task, value)
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.connection.close()


def _ready(busy: list[_Worker]) -> list[_Worker]:
    found = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in found]


def _start_worker(function: Callable[..., Any]) -> _Worker:
    # spawn, not fork: a fork has none of the caller's threads, and may inherit their locks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker_main, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _worker_main(function: Callable[..., Any], connection: Connection) -> None:
    """Main function of a worker. Receives tasks, sends progress and results; ends with the connection or the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.send(("begun", None))

    def exit_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    # Decoders print a line for each damaged image. The reasons are in rejected.jsonl.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            task = connection.recv()
            try:
                result = function(task, lambda count: connection.send(("progress", count)))
            except Exception as error:
                connection.send(("failed", _picklable(error)))
            else:
                connection.send(("done", result))


def _picklable(error: Exception) -> Exception:
    """The exception, or one with its text if it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
