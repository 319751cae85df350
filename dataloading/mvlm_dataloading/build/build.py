"""Building a data set from a source: pieces in parallel, resumed after a kill.

    .OUT.partial/plan.json        build state: name, recipe, labels of the pieces
    .OUT.partial/lock             flock: exclusive while a process builds
    .OUT.partial/pieces/000000/   one folder per finished piece (see `piece`)
    .OUT.partial/final/           the data set; renamed to OUT when it is complete

The tar of a record depends on the source and the options alone. Every step either renames a finished result or can be
repeated. A build that was killed at any moment and resumed therefore gives the same bytes as an uninterrupted one.
"""

import errno
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mvlm_dataloading.dataset.description import already_written, require_free_folder
from mvlm_dataloading.dataset.durable_files import sync_folder, write_durably
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Piece, Source, file_sha256, records_sha256

from .assemble import Assembly, assemble
from .piece import write_piece
from .workers import run_tasks

log = logging.getLogger(__name__)

# Increment when equal input gives other samples. Data sets of an older revision are then refused, not reused.
_REVISION = 2
_MAX_CRASHES = 50
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Progress of a build."""

    pieces: int
    of_pieces: int
    records: int
    """Records processed by this run. Pieces of earlier runs do not count."""


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    piece: Piece


def build_shards(
    source: Source,
    out: Path,
    options: BuildOptions | None = None,
    *,
    evaluation_sets: Sequence[Path] = (),
    workers: int | None = None,
    progress: Callable[[BuildProgress], None] = lambda done: None,
) -> Path:
    """Write a source's shards to the folder `out`, or resume the build of an earlier run that was killed.

    Args:
        evaluation_sets: folders of other data sets. Their validation and test images are excluded from training, like
            those of this data set.
        workers: number of worker processes, one per core by default. 0 works in this process, which then dies if the
            decoder crashes.

    Raises:
        DataError: `out` is in use, another process writes it, no record is usable, the disk is full, or worker
            processes keep dying. In the last two cases finished pieces are kept next to `out`, and the same call
            resumes from them.
    """
    options = options or BuildOptions()
    options.check()
    out = Path(out).resolve()  # a link is kept, and its target becomes the data set
    if options.tokenizer is not None:
        need("tokenizers")
    recipe = _recipe(source, options, evaluation_sets)
    partial_folder = out.with_name(f".{out.name}.partial")
    if already_written(out, name=source.name, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a run that was killed at the very end
        return out
    if not source.pieces:
        raise DataError(f"{source.name}: wanted at least one sample, found none; give the folder that holds the data")
    with _hint_for_a_full_disk(out), _exclusive(partial_folder):
        require_free_folder(out)
        _start_or_resume(partial_folder, source, recipe)
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), len(source.pieces))
        _write_pieces(partial_folder / "pieces", source.pieces, options, workers, progress)
        counts = assemble(Assembly(partial_folder, source, options, recipe, tuple(evaluation_sets)))
        final = partial_folder / "final"
        sync_folder(final)
        final.rename(out)  # replaces an empty folder, and fails on any other
        sync_folder(out.parent)
        shutil.rmtree(partial_folder, ignore_errors=True)
    for what, count in sorted(counts.items()):
        log.info("%s: %d %s", out, count, what)
    return out


def _recipe(source: Source, options: BuildOptions, evaluation_sets: Sequence[Path]) -> dict[str, Any]:
    """Everything that determines the data set's bytes, as JSON values."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    if options.tokenizer is not None:
        given["tokenizer"] = file_sha256(options.tokenizer)
    excluded = [file_sha256(Path(folder) / "dataset.json") for folder in evaluation_sets]
    records = records_sha256(source.pieces)
    known = {"revision": _REVISION, **source.recipe, "records": records, **given, "against": excluded}
    return json.loads(json.dumps(known))


def _start_or_resume(folder: Path, source: Source, recipe: dict[str, Any]) -> None:
    """Compare the build state in `folder` with this build. Write the state if the folder has no such file.

    Raises:
        DataError: the folder holds the state of another build.
    """
    state = {"name": source.name, "recipe": recipe, "pieces": [piece.label for piece in source.pieces]}
    file = folder / "plan.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != json.loads(json.dumps(state)):
            raise DataError(
                f"{folder}: wanted an unfinished build of this input with these options, found another "
                f"one; finish it with its own command, or remove the folder to start over"
            )
        log.info("%s: resuming where the last run ended", folder)
        return
    # Remove what a `ShardWriter` left, or a build that was killed before it wrote its state.
    for left in folder.iterdir():
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    aside = file.with_suffix(".tmp")
    write_durably(aside, json.dumps(state))
    aside.rename(file)
    sync_folder(folder)


def _write_pieces(
    folder: Path,
    pieces: Sequence[Piece],
    options: BuildOptions,
    workers: int,
    progress: Callable[[BuildProgress], None],
) -> None:
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    # Finished pieces are skipped.
    tasks = [_Task(i, piece) for i, piece in enumerate(pieces) if not (folder / f"{i:06d}").is_dir()]
    done, records = len(pieces) - len(tasks), 0
    progress(BuildProgress(done, len(pieces), records))
    crashes: Counter[int] = Counter()
    events = run_tasks(partial(_write_task, folder, options), tasks, workers)
    for event in events:
        if event.kind == "died":
            number = event.task.number
            crashes[number] += 1
            if crashes[number] > _MAX_CRASHES:
                raise DataError(
                    f"{pieces[number].label}: wanted the piece to finish, found that {crashes[number]} worker "
                    f"processes died on it (exit code {event.value}); add memory or leave that part out"
                )
            _note_crash(folder, number)
            log.warning(
                "a worker process died (exit code %s); another one takes over: %s", event.value, pieces[number].label
            )
            events.send(event.task)
            continue
        done += event.kind == "done"
        records += event.value if event.kind == "progress" else 0
        progress(BuildProgress(done, len(pieces), records))


def _write_task(folder: Path, options: BuildOptions, task: _Task, report: Callable[[int], None]) -> None:
    target = folder / f"{task.number:06d}"
    noted = _crash_file(folder, task.number)
    crashes = json.loads(noted.read_text()) if noted.is_file() else {}
    write_piece(task.piece, target, options, crashes, report)


def _crash_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.crashes"


def _note_crash(folder: Path, number: int) -> None:
    """Record which images a worker was decoding when it died.

    Images decoded together become suspects, and the next worker decodes each suspect alone. A suspect that was being
    decoded alone is fatal.
    """
    noted = _crash_file(folder, number)
    crashes = json.loads(noted.read_text()) if noted.is_file() else {"suspect": [], "fatal": []}
    for left in folder.glob(f"{number:06d}.*.tmp"):
        decoding = left / "decoding"
        try:
            numbers = json.loads(decoding.read_text())
        except (OSError, ValueError):
            numbers = []
        crashes["fatal" if len(numbers) == 1 and numbers[0] in crashes["suspect"] else "suspect"] += numbers
        shutil.rmtree(left, ignore_errors=True)
    aside = noted.with_suffix(".new")
    write_durably(aside, json.dumps(crashes))
    aside.rename(noted)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder of an unfinished build. The kernel drops the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"{folder}: wanted to be the only process that writes there, found another; wait for it or stop it"
        ) from None
    with lock:
        yield


@contextmanager
def _hint_for_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise DataError(
            f"{out}: wanted room to write, found none ({error.strerror}); free some space and give the same command "
            f"again, finished pieces are kept in {out.with_name(f'.{out.name}.partial')}"
        ) from None
