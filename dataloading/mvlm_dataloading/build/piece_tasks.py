"""Pieces of a part, written by worker processes of this machine. A decoder that dies costs one image.

A part at a URL is written piece by piece to a folder of this machine, and each finished piece is moved to the URL.
"""

import hashlib
import json
import logging
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mvlm_dataloading.dataset.remote_cache import cache_folder
from mvlm_dataloading.dataset.remote_files import RemoteFolder, is_remote, normal_url
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import write_file
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Piece

from .local_folder import LocalFolder, discard
from .piece import write_piece
from .workers import run_tasks

log = logging.getLogger(__name__)

MAX_CRASHES = 50
"""A piece on which more processes have died ends the build."""
_FINISHED = re.compile(r"pieces/(\d{6})/shards\.json")
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class PieceTask:
    """One piece to write, and its number in the source."""

    number: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class PieceJob:
    """Place and options of the pieces of a part."""

    place: str
    """Folder or URL of the part."""
    options: BuildOptions


def working_folder(place: Path | str) -> Path:
    """The folder on this machine in which a part is written: the part itself, unless it is at a URL."""
    if not is_remote(place):
        return Path(place)
    return cache_folder() / "builds" / hashlib.sha256(normal_url(place).encode()).hexdigest()[:24]


def finished_pieces(part: LocalFolder | RemoteFolder) -> set[int]:
    """Numbers of the finished pieces of a part."""
    return {int(found[1]) for name in part.names("pieces") if (found := _FINISHED.fullmatch(name))}


def write_pieces(job: PieceJob, tasks: Sequence[PieceTask], workers: int) -> Iterator[tuple[int, int]]:
    """Write pieces with worker processes. Yields, as they happen, how many pieces and records have been added.

    Raises:
        DataError: worker processes keep dying on a piece.
    """
    folder = working_folder(job.place) / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    crashes: Counter[int] = Counter()
    events = run_tasks(partial(_write_task, job, folder), tasks, workers)
    for event in events:
        if event.kind == "died":
            task = event.task
            crashes[task.number] += 1
            if crashes[task.number] > MAX_CRASHES:
                raise DataError(
                    f"{task.piece.label}: wanted the piece to finish, found that {crashes[task.number]} worker "
                    f"processes died on it (exit code {event.value}); add memory or leave that part out"
                )
            left = list(folder.glob(f"{task.number:06d}.{event.process}-*.tmp"))
            if event.value not in _KILLED:  # else somebody killed it, or it had no memory: no image is to blame
                _note_crash(folder, task.number, left)
            for aside in left:
                discard(aside)
            log.warning(
                "a worker process died (exit code %s); another one takes over: %s", event.value, task.piece.label
            )
            events.send(task)
            continue
        yield int(event.kind == "done"), event.value if event.kind == "progress" else 0


def _write_task(job: PieceJob, folder: Path, task: PieceTask, report: Callable[[int], None]) -> None:
    target = folder / f"{task.number:06d}"
    noted = _crash_file(folder, task.number)
    crashes = json.loads(noted.read_text()) if noted.is_file() else {}
    if not target.is_dir():  # else it has only to be moved to its URL
        write_piece(task.piece, target, job.options, crashes, report)
    if is_remote(job.place):
        _move(target, RemoteFolder(job.place))


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


def _crash_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.crashes"


def _note_crash(folder: Path, number: int, left: Sequence[Path]) -> None:
    """Record which images a worker was decoding when it died, from the folders that it has left.

    Images decoded together become suspects, and the next worker decodes each suspect alone. A suspect that was being
    decoded alone is fatal, with all records of its image.
    """
    noted = _crash_file(folder, number)
    crashes = json.loads(noted.read_text()) if noted.is_file() else {"suspect": [], "fatal": []}
    for one in left:
        decoding = one / "decoding"
        try:
            numbers = json.loads(decoding.read_text())
        except (OSError, ValueError):
            numbers = []
        crashes["fatal" if numbers and set(numbers) <= set(crashes["suspect"]) else "suspect"] += numbers
    write_file(noted, json.dumps(crashes))
