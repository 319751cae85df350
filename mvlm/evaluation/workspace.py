"""Arrays of an evaluation on disk, and the parts in which its ranks fill them.

Rows of an array are written with `pwrite` and read through a memory map, so features need no room in memory. A part is
the same work whatever the number of ranks and however often an evaluation was interrupted; so are its results.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.files import LOCK, lock_folder
from mvlm.progress import WorkProgress
from mvlm.untrusted import read_spec
from mvlm_dataloading import DataError
from mvlm_dataloading.files import aside_of, write_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the stored arrays. A folder with arrays of another version is emptied and begun anew."""
SPEC = "plan.json"
"""File with the specification of unfinished work: everything that its results depend on."""
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SAME_WORK = "on machines of one kind; name one of the checkpoints of a run that still trains"
"""Advice in the error of `check_same` if ranks would evaluate different models or compute differently."""

Work = Callable[[int, int], Iterator[None]]
"""Work on rows `start` to `stop` - 1, which yields after each part."""


class EvaluationStopped(Exception):
    """An evaluation that was asked to end before it was finished. All ranks raise it together."""


class StoredArray:
    """An array in a file, or in memory if `path` is None. It is filled by rows; rows not yet written are zero."""

    def __init__(self, path: Path | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self.written = False
        """True if this process has written rows that are not yet forced to the disk or sent to other ranks."""
        self._file: int | None = None
        self._mapped: Tensor | None = None
        rows = torch.empty(1, *shape[1:], dtype=dtype)
        self._row_bytes = rows.numel() * rows.element_size()
        self._path = path
        if path is None:
            self._mapped = torch.zeros(shape, dtype=dtype)
        else:
            # NOTE: open for writing alone. Else NFS reads the rest of a page first, and writes old bytes over the rows
            # of other nodes.
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            os.ftruncate(self._file, shape[0] * self._row_bytes)  # every rank does; it changes nothing but the size

    @property
    def tensor(self) -> Tensor:
        """All rows, on the CPU. Rows of a file are read when they are used."""
        if self._mapped is None:
            numbers = self._shape[0] * self._row_bytes // self._dtype.itemsize
            flat = (
                torch.from_file(str(self._path), shared=False, size=numbers, dtype=self._dtype)
                if numbers
                else torch.empty(0, dtype=self._dtype)
            )
            self._mapped = flat.view(self._shape)
        return self._mapped

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows of the array's dtype, the first of them as row `start`."""
        assert rows.dtype == self._dtype, (rows.dtype, self._dtype)
        assert rows.shape[1:] == self._shape[1:], (rows.shape, self._shape)
        self.written = True
        if self._file is None:
            self.tensor[start : start + len(rows)] = rows.cpu()
            return
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        place = start * self._row_bytes
        while data:
            done = os.pwrite(self._file, data, place)
            data, place = data[done:], place + done

    def sync(self) -> None:
        """Force the rows written so far to the disk."""
        if self.written and self._file is not None:
            os.fsync(self._file)
            self.written = False

    def close(self) -> None:
        """Close the file. What was read stays readable."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Workspace:
    """Arrays of one evaluation, filled by stages of work that all ranks share.

    Args:
        folder: folder of the arrays, on a disk that all ranks see; None keeps them in the memory of every rank.
        world: ranks that share the work.
        resumable: record finished parts, forced to the disk first. Another workspace in this folder skips them.
        go_on: asked before each stage and after each part; False ends the evaluation on all ranks.
        shown: show the progress of each stage.
    """

    def __init__(
        self,
        folder: Path | None = None,
        world: World = ALONE,
        *,
        resumable: bool = False,
        go_on: Callable[[], bool] = lambda: True,
        shown: bool = False,
    ) -> None:
        self.folder, self.world = folder, world
        self._resumable, self._go_on, self._shown = resumable, go_on, shown
        self._arrays: list[StoredArray] = []

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredArray:
        """Make the array `name`, or open it with the rows that an unfinished evaluation wrote to the folder.

        Every rank must ask for the same arrays.
        """
        found = StoredArray(None if self.folder is None else self.folder / name, shape, dtype)
        self._arrays.append(found)
        return found

    def share(self, stage: str, rows: int, size: int, work: Work, unit: str = "samples") -> None:
        """Share work on `rows` rows among the ranks, in parts of `size` rows. Returns when all ranks have finished.

        Args:
            stage: name of the work, unique in the evaluation.
            work: called for runs of parts that are not finished. It yields after each part, written.
            unit: plural noun of the rows, for the progress.

        Raises:
            EvaluationStopped: `go_on` was False on a rank.
        """
        parts = -(-rows // size)
        finished = self.array(f"{stage}.finished", (parts,), torch.uint8)
        already = finished.tensor.clone()

        def own() -> bool:
            first, last = (rank * parts // self.world.size for rank in (self.world.rank, self.world.rank + 1))
            done, counted = int(already[first:last].sum()), 0
            with self._progress(unit) as progress:
                if not self._go_on():
                    return False
                if progress is not None:
                    progress.show(done, last - first, 0)
                for start, stop in _unfinished(already.tolist(), first, last):
                    for part, _ in enumerate(work(start * size, min(stop * size, rows)), start):
                        self._record(finished, part)
                        done, counted = done + 1, counted + min(size, rows - part * size)
                        if progress is not None:
                            progress.show(done, last - first, counted)
                        if not self._go_on():
                            return False
            return True

        going = run_on_all_ranks(self.world, own)
        if not all(self.world.gather_objects(going)):
            raise EvaluationStopped
        if self.folder is None and self.world.size > 1:
            self._exchange()

    def _exchange(self) -> None:
        """Sum arrays in memory over ranks, so that each rank has the rows of all: rows that it did not write are 0."""
        own = [number for number, array in enumerate(self._arrays) if array.written]
        for number in sorted({number for found in self.world.gather_objects(own) for number in found}):
            self.world.all_reduce(self._arrays[number].tensor)
            self._arrays[number].written = False

    def _progress(self, unit: str) -> contextlib.AbstractContextManager[WorkProgress | None]:
        return WorkProgress(unit, short=True) if self._shown and self.world.first else contextlib.nullcontext()

    def _record(self, finished: StoredArray, part: int) -> None:
        if self._resumable:
            for array in self._arrays:
                array.sync()
            finished.write(part, torch.ones(1, dtype=torch.uint8))

    def close(self) -> None:
        """Close the files."""
        for array in self._arrays:
            array.close()


def _unfinished(finished: list[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs (start, stop) of the parts `first` to `last` - 1 that are not finished."""
    start = first
    while start < last:
        stop = start
        while stop < last and not finished[stop]:
            stop += 1
        if stop > start:
            yield start, stop
        start = stop + 1


@contextlib.contextmanager
def open_workspace(folder: Path | None, spec: dict[str, Any], world: World = ALONE) -> Iterator[Workspace]:
    """Context with a workspace in a folder, which continues an unfinished evaluation of the same specification.

    The folder is removed at the end, and if the data are broken. It stays after any other interruption.

    Args:
        folder: new, or of an unfinished evaluation; None for a temporary folder of one rank.
        spec: everything that the results depend on, as JSON. Work of another specification is removed.

    Raises:
        RunError: the folder holds something else, or another process writes there.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="mvlm-evaluation-") as temporary:
            workspace = Workspace(Path(temporary), world, shown=True)
            with contextlib.closing(workspace):
                yield workspace
        return
    with run_on_all_ranks(world, lambda: _lock(folder, spec) if world.first else contextlib.nullcontext()):
        workspace = Workspace(folder, world, resumable=True, shown=True)
        with contextlib.closing(workspace):
            try:
                yield workspace
            except DataError:
                _remove(folder)
                raise
        world.gather_objects(None)  # no rank reads the arrays any more
        if world.first:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a workspace's folder. If that is interrupted, no later evaluation continues from what remains."""
    with contextlib.suppress(OSError):
        _empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Remove all work in the folder.

    NOTE: the specification goes first. After a kill in between, an evaluation that still found it would read missing
    rows as zeros.
    """
    file = folder / SPEC
    write_json(file, {})
    for path in set(folder.iterdir()) - {folder / LOCK, file}:
        path.unlink(missing_ok=True)


def _lock(folder: Path, spec: dict[str, Any]) -> contextlib.AbstractContextManager[object]:
    """Lock a workspace's folder, made if missing, and empty it unless its work is of this specification.

    Returns a context that holds the lock. RunError if the folder holds something else, or if another process has it.
    """
    spec = {"format_version": FORMAT_VERSION, **spec}
    file = folder / SPEC
    ours = {folder / LOCK, aside_of(file)}
    if folder.exists() and not (folder.is_dir() and (file.is_file() or set(folder.iterdir()) <= ours)):
        raise RunError(f"{folder}: wanted no such path or an unfinished evaluation, found something else; move it away")
    held = lock_folder(folder)
    if read_spec(file) == spec:
        log.info("continuing the evaluation in %s", folder)
    else:
        _empty(folder)
        write_json(file, spec)
    return held
