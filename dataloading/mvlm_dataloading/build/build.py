"""Making a data set of a source: pieces side by side, and again from where a killed run was.

    .OUT.partial/plan.json        what is being built: name, recipe, labels of the pieces
    .OUT.partial/pieces/000000/   one folder for each piece that is done (`piece.py`)
    .OUT.partial/final/           the data set, until it is complete and becomes OUT

Which records go into which tar depends on the source and the settings alone, and each step renames what it has
completed or can be done again. So a run that is killed at any moment and started again ends with the bytes of one that
was not.
"""

import errno
import fcntl
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

from mvlm_dataloading.dataset.description import already_written, refuse_occupied, sync_folder, write_durably
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.options import Settings
from mvlm_dataloading.sources.record import Piece, Source

from .assemble import Assembly, assemble
from .piece import write_piece
from .workers import work

log = logging.getLogger(__name__)

# Bumped when equal input gives other bytes, so that a folder built before is not taken for what would be built now.
_REVISION = 2
_MAX_CRASHES = 50
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Done:
    """How far a build is."""

    pieces: int
    of_pieces: int
    records: int
    """Records seen by this process, not counting pieces that an earlier run did."""


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    piece: Piece


def build_shards(
    source: Source,
    out: Path,
    settings: Settings | None = None,
    *,
    against: Sequence[Path] = (),
    workers: int | None = None,
    progress: Callable[[Done], None] = lambda done: None,
) -> Path:
    """Write a source's shards to the folder `out`, or go on with that where an earlier run was killed.

    Args:
        against: other data sets, whose validation and test pictures are excluded from training as this one's are.
        workers: processes, one per core by default. 0 works in this process, which then dies with a decoder.

    Raises:
        DataError: `out` holds something else, or is being written by another process; nothing usable was found; the
            disk is full. What has been done is kept beside `out`, and the same call goes on with it.
    """
    settings = settings or Settings()
    settings.check()
    out = Path(out).resolve()  # a link gets what it leads to filled, and is not replaced
    if settings.tokenizer is not None:
        need("tokenizers")
    recipe = _recipe(source, settings, against)
    partial_folder = out.with_name(f".{out.name}.partial")
    if already_written(out, name=source.name, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a run that was killed at the very end
        return out
    if not source.pieces:
        raise DataError(f"{source.name}: wanted at least one sample, found none; give the folder that holds the data")
    with _hint_for_a_full_disk(out), _locked(partial_folder):
        refuse_occupied(out)
        _plan(partial_folder, source, recipe)
        if workers is None:
            workers = min(len(os.sched_getaffinity(0)), len(source.pieces))
        _write_pieces(partial_folder / "pieces", source.pieces, settings, workers, progress)
        counts = assemble(Assembly(partial_folder, source, settings, recipe, tuple(against)))
        final = partial_folder / "final"
        sync_folder(final)
        final.rename(out)  # takes the place of an empty folder, fails on any other
        sync_folder(out.parent)
        shutil.rmtree(partial_folder, ignore_errors=True)
    _report(out, counts)
    return out


def _recipe(source: Source, settings: Settings, against: Sequence[Path]) -> dict[str, Any]:
    from mvlm_dataloading.sources.record import file_sha256, records_sha256

    given = {name: value for name, value in asdict(settings).items() if value is not None}
    if settings.tokenizer is not None:
        given["tokenizer"] = file_sha256(settings.tokenizer)
    excluded = [file_sha256(Path(folder) / "dataset.json") for folder in against]
    records = records_sha256(source.pieces)
    known = {"revision": _REVISION, **source.recipe, "records": records, **given, "against": excluded}
    return json.loads(json.dumps(known))


def _plan(folder: Path, source: Source, recipe: dict[str, Any]) -> None:
    """Compare what is there with what is to be built, and write it down if nothing is."""
    plan = {"name": source.name, "recipe": recipe, "pieces": [piece.label for piece in source.pieces]}
    file = folder / "plan.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != json.loads(json.dumps(plan)):
            raise DataError(
                f"{folder}: wanted what a run with these settings and this input left, found that of another; "
                f"give the same command again, or remove the folder to begin anew"
            )
        log.info("%s: going on where the last run ended", folder)
        return
    for left in folder.iterdir():  # by a writer of another kind, or by one that did not get as far as a plan
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    aside = file.with_suffix(".tmp")
    write_durably(aside, json.dumps(plan))
    aside.rename(file)
    sync_folder(folder)


def _write_pieces(
    folder: Path, pieces: Sequence[Piece], settings: Settings, workers: int, progress: Callable[[Done], None]
) -> None:
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    tasks = [_Task(i, piece) for i, piece in enumerate(pieces) if not (folder / f"{i:06d}").is_dir()]
    done, records = len(pieces) - len(tasks), 0
    progress(Done(done, len(pieces), records))
    crashes: Counter[int] = Counter()
    events = work(partial(_do, folder, settings), tasks, workers)
    for event in events:
        if event.kind == "died":
            number = event.task.number
            crashes[number] += 1
            if crashes[number] > _MAX_CRASHES:
                raise DataError(
                    f"{pieces[number].label}: wanted a process to live through it, found {crashes[number]} dead "
                    f"(exit code {event.value}); give it more memory or leave that part out"
                )
            _note_crash(folder, number)
            log.warning("a process died (exit code %s) and another takes over: %s", event.value, pieces[number].label)
            events.send(event.task)
            continue
        done += event.kind == "done"
        records += event.value if event.kind == "beat" else 0
        progress(Done(done, len(pieces), records))


def _do(folder: Path, settings: Settings, task: _Task, beat: Callable[[int], None]) -> None:
    target = folder / f"{task.number:06d}"
    noted = _crash_file(folder, task.number)
    crashes = json.loads(noted.read_text()) if noted.is_file() else {}
    write_piece(task.piece, target, settings, crashes, beat)


def _crash_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.crashes"


def _note_crash(folder: Path, number: int) -> None:
    """Which records were being decoded when a process died. One alone is guilty; of several, each is tried alone."""
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
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: wanted to be the only one that writes there, found another; wait for it or stop it"
            ) from None
        yield


@contextmanager
def _hint_for_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DataError(
            f"{out}: wanted room to write, found none ({error.strerror}); what is done is kept in "
            f"{out.with_name(f'.{out.name}.partial')}: free some space and give the same command again"
        ) from None


def _report(out: Path, counts: Counter[str]) -> None:
    for what, count in sorted(counts.items()):
        log.info("%s: %d %s", out, count, what)
