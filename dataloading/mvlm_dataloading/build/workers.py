"""Processes that work through tasks, where the death of one is no more than news."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a task: `kind` is "beat" (with a count), "done" (with the result), or "died" (with how
    the process ended)."""

    kind: str
    task: Any
    value: Any = None


@dataclass(slots=True)
class _Member:
    process: Any
    connection: Connection
    task: Any = None


def work(function: Callable[..., Any], tasks: Iterable[Any], workers: int) -> Generator[Event, Any, None]:
    """Call `function(task, beat)` for each task, in `workers` processes, or in this one if `workers` is 0.

    What it returns comes with "done".

    An exception of a task is raised here, and ends the others. A task whose process died is not done again by itself:
    who wants that sends it back with `generator.send(task)` in answer to the event.
    """
    if workers == 0:
        for task in tasks:
            beats: list[int] = []
            result = function(task, beats.append)
            yield Event("beat", task, sum(beats))
            yield Event("done", task, result)
        return
    waiting, returned = iter(tasks), []
    crew: list[_Member] = []
    try:
        while True:
            while len(crew) < workers or any(member.task is None for member in crew):
                task = returned.pop() if returned else next(waiting, None)
                if task is None:
                    break
                member = next((one for one in crew if one.task is None), None)
                if member is None:
                    member = _hire(function)
                    crew.append(member)
                member.task = task
                with contextlib.suppress(OSError):  # one that has died is noticed below
                    member.connection.send(task)
            busy = [member for member in crew if member.task is not None]
            if not busy:
                return
            for member in _ready(busy):
                try:
                    kind, value = member.connection.recv()
                except (EOFError, OSError):
                    crew.remove(member)
                    member.process.join()
                    again = yield Event("died", member.task, member.process.exitcode)
                    if again is not None:
                        returned.append(again)
                        yield Event("beat", again, 0)  # the answer to `send`
                    continue
                if kind == "failed":
                    raise value
                task = member.task
                if kind == "done":
                    member.task = None
                yield Event(kind, task, value)
    finally:
        for member in crew:
            member.process.kill()
        for member in crew:
            member.process.join()
            member.connection.close()


def _ready(busy: list[_Member]) -> list[_Member]:
    found = wait([member.connection for member in busy])
    return [member for member in busy if member.connection in found]


def _hire(function: Callable[..., Any]) -> _Member:
    # Not fork: the caller may have threads, which do not survive it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Member(process, ours)


def _serve(function: Callable[..., Any], connection: Connection) -> None:
    """The life of a member: tasks in, beats and results out, until the connection or the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    # The decoders print a line for each damaged picture; the reasons are in rejected.jsonl.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            task = connection.recv()
            try:
                result = function(task, lambda count: connection.send(("beat", count)))
            except Exception as error:
                connection.send(("failed", _portable(error)))
            else:
                connection.send(("done", result))


def _portable(error: Exception) -> Exception:
    """The exception, or its text where it cannot be sent."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")
