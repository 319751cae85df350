"""Tasks, such as pieces of a part, done by worker processes of this machine or by the nodes of a Ray cluster.

A process pool survives the death of a worker, so a decoder that dies costs one image. A part at a URL is written piece
by piece to a folder of this machine, and each finished piece is moved to the URL.

A task on a Ray cluster is a few pieces, which one process of a node writes as `write_pieces` does on one machine. Tasks
of a lost node are given to other nodes, where finished pieces are skipped. The nodes share the folder of the part, or
it is at a URL. They have this package installed, and the files of the source under the same paths.
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mvlm_dataloading.dataset.folders import LocalFolder, RemoteFolder, discard, open_folder
from mvlm_dataloading.dataset.remote_cache import cache_folder
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.files import write_file
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Piece
from mvlm_dataloading.urls import is_remote, normal_url

from .piece import write_piece

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """Progress, result or death of a task in a worker process.

    `kind` is "progress" (value: what was reported, mostly a count), "done" (value: result) or "died" (value: exit code
    of its process).
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
    """False until the worker process has started and has imported the program that called `run_tasks`."""


def run_tasks(function: Callable[..., Any], tasks: Iterable[Any], workers: int) -> Generator[TaskEvent, Any, None]:
    """Call `function(task, report)` for each task in worker processes, and yield events as they occur.

    An exception of a task is raised here and ends the pool. A task whose process died is not retried automatically. To
    retry it, call `generator.send(task)` on its "died" event.

    Args:
        function: must be picklable. It calls its second argument with counts of work done, or with other news.
        workers: number of processes; 0 runs the tasks in this process.

    Raises:
        DataError: a worker fails to import the program that called, as it does a script that calls outside of
            ``if __name__ == "__main__":``.
    """
    if workers == 0:
        for task in tasks:
            reported: list[Any] = []
            result = function(task, reported.append)
            for one in reported:
                yield TaskEvent("progress", task, one)
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
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
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


def _start_worker(function: Callable[..., Any]) -> _Worker:
    # NOTE: spawn, not fork. A fork has none of the caller's threads, and waits for ever for a lock that one held.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker_main, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _worker_main(function: Callable[..., Any], connection: Connection) -> None:
    """Main function of a worker process: call `function` on each task that arrives, and send back events.

    It ends when the connection is closed, or when the parent process ends.
    """
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


MAX_CRASHES = 50
"""A piece on which more processes have died ends the build."""
_FINISHED = re.compile(r"pieces/(\d{6})/shards\.json")
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


def working_folder(place: Path | str) -> Path:
    """The folder on this machine in which a part is written: the part itself, unless it is at a URL."""
    if not is_remote(place):
        return Path(place)
    return cache_folder() / "builds" / hashlib.sha256(normal_url(place).encode()).hexdigest()[:24]


def finished_pieces(part: LocalFolder | RemoteFolder) -> set[int]:
    """Numbers of the finished pieces of a part."""
    return {int(found[1]) for name in part.names("pieces") if (found := _FINISHED.fullmatch(name))}


def write_pieces(
    place: str, options: BuildOptions, tasks: Sequence[tuple[int, Piece]], workers: int
) -> Iterator[tuple[int, int]]:
    """Write pieces with worker processes. Yields, as they happen, how many pieces and records have been added.

    Args:
        place: folder or URL of the part.
        tasks: pieces, and their numbers in the source.
    """
    folder = working_folder(place) / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    crashes: Counter[int] = Counter()
    events = run_tasks(partial(_write_task, place, options, folder), tasks, workers)
    for event in events:
        if event.kind == "died":
            number, piece = event.task
            crashes[number] += 1
            if crashes[number] > MAX_CRASHES:
                raise DataError(
                    f"{piece.label}: wanted the piece to finish, found that {crashes[number]} worker processes died on "
                    f"it (exit code {event.value}); add memory or leave that part out"
                )
            left = list(folder.glob(f"{number:06d}.{event.process}-*.tmp"))
            if event.value not in _KILLED:  # else somebody killed it, or it had no memory: no image is to blame
                _note_crash(folder, number, left)
            for aside in left:
                discard(aside)
            log.warning("a worker process died (exit code %s); another one takes over: %s", event.value, piece.label)
            events.send(event.task)
            continue
        yield int(event.kind == "done"), event.value if event.kind == "progress" else 0


def _write_task(
    place: str, options: BuildOptions, folder: Path, task: tuple[int, Piece], report: Callable[[int], None]
) -> None:
    number, piece = task
    target = folder / f"{number:06d}"
    if not target.is_dir():  # else it has only to be moved to its URL
        write_piece(piece, target, options, _crashes(folder, number), report)
    if is_remote(place):
        _move(target, RemoteFolder(place))


def _move(piece: Path, remote: RemoteFolder) -> None:
    """Move a finished piece to the URL of its part. The file that tells of a finished piece comes last."""
    try:
        for path in sorted(piece.iterdir(), key=lambda path: (path.name == "shards.json", path.name)):
            remote.put(path, f"pieces/{piece.name}/{path.name}")
    except (DataError, OSError):
        # Another process on this machine may have moved it: one that has lost its build and does not know.
        if not remote.has(f"pieces/{piece.name}/shards.json"):
            raise
    shutil.rmtree(piece, ignore_errors=True)


def _crashes(folder: Path, number: int) -> dict[str, list[int]]:
    """Numbers of the records of a piece that killed a decoder: "fatal" if decoded alone, "suspect" if among others."""
    noted = folder / f"{number:06d}.crashes"
    return json.loads(noted.read_text()) if noted.is_file() else {"suspect": [], "fatal": []}


def _note_crash(folder: Path, number: int, left: Sequence[Path]) -> None:
    """Record which images a worker was decoding when it died, from the folders that it has left.

    Images decoded together become suspects, which the next worker decodes alone. One that was decoded alone is fatal.
    """
    crashes = _crashes(folder, number)
    for one in left:
        try:
            numbers = json.loads((one / "decoding").read_text())
        except (OSError, ValueError):
            numbers = []
        crashes["fatal" if numbers and set(numbers) <= set(crashes["suspect"]) else "suspect"] += numbers
    write_file(folder / f"{number:06d}.crashes", json.dumps(crashes))


LISTING_S = 90.0
"""Longest time that a network disk hides new files from other machines."""
_MAX_PIECES = 8
_TASKS_PER_CORE = 4


def write_pieces_on_ray(
    place: str, options: BuildOptions, tasks: Sequence[tuple[int, Piece]]
) -> Iterator[tuple[int, int]]:
    """Write pieces on a Ray cluster. Yields, as tasks end, how many pieces and records have been added."""
    size = max(1, min(_MAX_PIECES, len(tasks) // (_TASKS_PER_CORE * ray_cores())))
    chunks = [tasks[begin : begin + size] for begin in range(0, len(tasks), size)]
    with contextlib.closing(run_tasks_on_ray(partial(_write_chunk, place, options), chunks)) as events:
        yield from (event.value for event in events if event.kind == "done")


def run_tasks_on_ray(function: Callable[..., Any], tasks: Iterable[Any]) -> Generator[TaskEvent, None, None]:
    """Do tasks, like `run_tasks`, on the nodes of a Ray cluster. Events of a task come when it ends. None is "died".

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, else starts one on this machine. A task whose
    process or node was lost is done again, up to `MAX_CRASHES` times.
    """
    ray = need("ray", "ray")
    ray_cores()
    call = ray.remote(num_cpus=1, max_retries=MAX_CRASHES)(_events_of)
    waiting = [call.remote(function, task) for task in tasks]
    try:
        while waiting:
            ended, waiting = ray.wait(waiting)
            try:
                yield from ray.get(ended[0])
            except ray.exceptions.RayTaskError as error:  # an exception of the task, wrapped with its stack
                raise error.cause from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def _events_of(function: Callable[..., Any], task: Any) -> list[TaskEvent]:
    return list(run_tasks(function, [task], 0))


def ray_cores() -> int:
    """Number of CPU cores of the Ray cluster, which is joined or started first if need be."""
    ray = need("ray", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def wait_for_files(place: Path | str, missing: Callable[[], Collection[Any]]) -> None:
    """Wait until this machine lists what other nodes of a cluster have written: until `missing()` is empty.

    Network disks keep old listings for a while. DataError if something is missing after `LISTING_S` seconds.
    """
    deadline = time.monotonic() + LISTING_S
    while left := missing():
        if time.monotonic() >= deadline:
            raise DataError(
                f"{place}: wanted a folder that all nodes of the cluster share, found {len(left)} new pieces missing "
                "on this machine; name a shared folder or a URL"
            )
        time.sleep(0.5)


def _write_chunk(
    place: str, options: BuildOptions, tasks: Sequence[tuple[int, Piece]], report: Callable[[int], None]
) -> tuple[int, int]:
    part = open_folder(place)
    # A node that was lost may have finished some of these.
    left = [(number, piece) for number, piece in tasks if not part.has(f"pieces/{number:06d}/shards.json")]
    return len(tasks), sum(records for _, records in list(write_pieces(place, options, left, workers=1)))
