"""Copies of a run's checkpoints in an object store, made while it trains, and the run restored from them.

    PREFIX/step_00000600/
        model/ ... manifest.json    the checkpoint, as `mvlm.runs.checkpoint` has it
        run/                        config.json, history.jsonl and metrics.jsonl up to this checkpoint
        mirror.json                 bytes and SHA-256 of all of these, written last

A folder without a mirror.json is no checkpoint: an upload that was killed, or is not finished. Before an upload
replaces a checkpoint, and before an old one is removed, its mirror.json goes first.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mvlm.errors import RunError
from mvlm.runs.checkpoint import MANIFEST, checkpoint_name, checkpoints, set_aside, step_of, verify_checkpoint
from mvlm.runs.folder import RunFolder, RunLock
from mvlm.runs.history import SAVE
from mvlm.runs.object_store import PART_BYTES, StoreError, StoreFolder
from mvlm.schemas import MirrorManifest, fits
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import place_folder, sha256, sync, write_file
from mvlm_dataloading.untrusted import LIMITS, open_regular, parse_json, read_regular

log = logging.getLogger(__name__)
T = TypeVar("T")

MIRROR = "mirror.json"
FORMAT_VERSION = 1
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pause after the first failed attempt, doubled after each further one, up to the longest."""
PATIENCE_S = 60.0
"""Time for which a run that begins or ends keeps trying to reach a store that is away."""
CONFIG, HISTORY = "run/config.json", "run/history.jsonl"
_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*){0,3}")


class DamagedError(Exception):
    """A checkpoint in the object store has files of other lengths or hashes than its mirror.json names."""


class Mirror:
    """Context with a thread that copies finished checkpoints to an object store. Rank 0 only.

    The newest checkpoint is copied; older ones that are still waiting are left out. While the store is away training
    goes on. The first failure is logged, and the copy is tried again until it succeeds. The context waits at its end
    for the last copy, but not after an error, and not for a store that has been away for `PATIENCE_S`.

    Args:
        keep: newest checkpoints to keep in the store; 0 for all.
    """

    def __init__(self, store: StoreFolder, run: RunFolder, keep: int) -> None:
        self._store, self._run, self._keep = store, run, keep
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._ending = False
        self._failing = False
        self.copying: Path | None = None
        """The checkpoint that is being copied, which must not be removed meanwhile."""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def add(self, checkpoint: Path) -> None:
        """Copy a finished checkpoint as soon as the one before is copied."""
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify_all()

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if kind is not None:
            return
        until = time.monotonic() + PATIENCE_S
        while self._thread.is_alive() and not (self._failing and time.monotonic() > until):
            self._thread.join(0.1)
        if self._thread.is_alive():
            log.warning(
                "%s: the last checkpoint is not there, as nothing can be written; the same command with --resume "
                "copies it",
                self._store.url,
            )

    def _work(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._ending)
                checkpoint, self._waiting, self.copying = self._waiting, None, self._waiting
            if checkpoint is None:
                return
            try:
                self._copy(checkpoint)
            except Exception as error:
                self._note_failure(checkpoint, error)
                self.copying = None
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting is not None or self._ending, pause)
                    self._waiting = self._waiting or (checkpoint if checkpoint.is_dir() else None)
                if self._ending:
                    time.sleep(FIRST_PAUSE_S)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self.copying = None
                if self._failing:
                    log.info("%s can be written again", self._store.url)
                self._failing, pause = False, FIRST_PAUSE_S

    def _note_failure(self, checkpoint: Path, error: Exception) -> None:
        if not self._failing:
            # Errors of other packages may have credentials in them.
            ours = isinstance(error, StoreError | DataError | OSError)
            words = str(error) if ours else type(error).__name__
            log.warning(
                "%s: could not copy %s there: %s; training goes on, and it is tried again",
                self._store.url, checkpoint.name, words,
            )  # fmt: skip
            self._failing = True

    def _copy(self, checkpoint: Path) -> None:
        """Copy a checkpoint to the object store, unless it is there already. StoreError or OSError if it cannot."""
        folder = f"{checkpoint.name}/"
        files = files_of(checkpoint, self._run)
        content = json.dumps({"format_version": FORMAT_VERSION, "files": {n: f.described() for n, f in files.items()}})
        there = self._store.names(folder)
        if folder + MIRROR in there:
            with contextlib.suppress(StoreError):
                if self._store.read(folder + MIRROR, LIMITS["manifest"]) == content.encode():
                    return
        # NOTE: first. With it, the parts of two checkpoints would be taken for one until a hash is compared.
        self._store.delete([folder + MIRROR])
        self._store.delete([name for name in there if name.removeprefix(folder) not in {*files, MIRROR}])
        for name, file in files.items():
            self._store.put(folder + name, file.blocks(), file.size)
        self._store.put(folder + MIRROR, content.encode(), len(content))
        log.info("%s is at %s", checkpoint.name, self._store.url)
        if self._keep:
            self._remove_old(step_of(checkpoint))

    def _remove_old(self, step: int) -> None:
        """Remove checkpoints from the object store, except the newest `keep` among those of steps up to `step`.

        Unfinished copies are removed too.
        """
        names = self._store.names()
        steps = {s for name in names if (s := _step_of_name(name)) is not None and s <= step}
        kept = sorted(s for s in steps if f"{checkpoint_name(s)}/{MIRROR}" in names)[-self._keep :]
        for old in sorted(steps - set(kept)):
            folder = f"{checkpoint_name(old)}/"
            self._store.delete([folder + MIRROR])
            self._store.delete([name for name in names if name.startswith(folder)])


class _Part:
    """The first `size` bytes of a file that is copied to the object store, with their SHA-256."""

    def __init__(self, path: Path, size: int, digest: str | None = None) -> None:
        self._path, self.size = path, size
        self._digest = digest or _hash_of(self.blocks())

    def described(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._digest}

    def blocks(self) -> Iterator[bytes]:
        left = self.size
        with open_regular(self._path) as file:
            while left and (block := file.read(min(left, PART_BYTES))):
                left -= len(block)
                yield block


def _hash_of(blocks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def files_of(checkpoint: Path, run: RunFolder) -> dict[str, _Part]:
    """Files of a checkpoint, and of its run as they were at this checkpoint, by their names in the object store.

    Hashes of the checkpoint's files come from its manifest. OSError if a file is missing.
    """
    digests = parse_json(read_regular(checkpoint / MANIFEST, "manifest", within=checkpoint))["sha256"]
    found = {n: _Part(checkpoint / n, (checkpoint / n).stat().st_size, digest) for n, digest in sorted(digests.items())}
    manifest = checkpoint / MANIFEST
    found[MANIFEST] = _Part(manifest, manifest.stat().st_size)
    hashed = sha256(manifest)
    rows = lines = 0
    content = _history_of(run.history, run)
    for line in content.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            event = parse_json(line)
            if event.get("event") == SAVE and event.get("manifest") == hashed:
                rows, lines = event["metrics_bytes"], content.index(line) + len(line)
    lengths = {run.config: run.config.stat().st_size, run.history: lines, run.metrics: rows}
    return found | {f"run/{file.name}": _Part(file, size) for file, size in lengths.items() if size}


def _step_of_name(name: str) -> int | None:
    found = re.fullmatch(r"step_(\d{8,})/.+", name)
    return int(found[1]) if found else None


def open_mirror(url: Path, out: Path, resume: bool) -> StoreFolder:
    """Open the store of a run's copies before the run starts, and restore the newest checkpoint of both places.

    It is put into the run folder `out`, unless that has a good one of this step or a later one; so are the run's
    settings, rows and history, if they are missing or shorter. A checkpoint is opened once all of its files have the
    hashes of its mirror.json; one that has not is passed over with a warning.

    RunError if the store cannot be read, if it holds another run, or if it holds a run without `resume`. If only its
    names cannot be read and the folder has checkpoints, a warning is logged and the run goes on from these.
    """
    store, run = StoreFolder(url), RunFolder(out)
    try:
        names = _patiently(store.names)
    except StoreError as error:
        if resume and checkpoints(run.checkpoints):
            log.warning("%s: could not be read: %s; the run goes on from its own folder", store.url, error)
            return store
        raise _unreadable(store, error) from None
    steps = {step for name in names if (step := _step_of_name(name)) is not None}
    whole = {step for step in steps if f"{checkpoint_name(step)}/{MIRROR}" in names}
    if whole and not resume:
        raise RunError(f"{store.url}: holds a run already; continue it with --resume, or choose another --mirror")
    if whole:
        with RunLock(out):
            try:
                _restore_newest(store, run, whole)
            except StoreError as error:
                raise _unreadable(store, error) from None
    return store


def _unreadable(store: StoreFolder, error: StoreError) -> RunError:
    return RunError(f"{store.url}: wanted a store that can be read, found {error}; check --mirror, and try again")


def _restore_newest(store: StoreFolder, run: RunFolder, steps: set[int]) -> None:
    """Restore the newest undamaged checkpoint from the object store, unless the run folder has one as new.

    steps: steps of the checkpoints in the store.
    """
    own = next((step_of(path) for path in reversed(checkpoints(run.checkpoints)) if _is_good(path)), -1)
    for step in sorted(steps, reverse=True):
        try:
            files = _read_manifest(store, step)
            _check_same_run(store, run, step, files)
            if step > own:
                _restore(store, run, step, files)
            return
        except DamagedError as error:
            log.warning("%s/%s: %s; looking for an older one", store.url, checkpoint_name(step), error)


def _is_good(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except RunError:
        return False  # `checkpoint_to_resume` says why
    return True


Files = dict[str, tuple[int, str]]
"""Bytes and SHA-256 of the files of a checkpoint in the store, and of its run."""


def _read_manifest(store: StoreFolder, step: int) -> Files:
    content = _read(store, f"{checkpoint_name(step)}/{MIRROR}", LIMITS["manifest"])
    value: Any = None
    with contextlib.suppress(ValueError):
        value = parse_json(content)
    if not fits(value, MirrorManifest) or value["format_version"] != FORMAT_VERSION:
        raise DamagedError(f"{MIRROR} is damaged, or of another version of mvlm")
    files = {file: (one["bytes"], one["sha256"]) for file, one in value["files"].items()}
    if not all(_NAME.fullmatch(file) for file in files) or not {MANIFEST, CONFIG} <= set(files):
        raise DamagedError(f"{MIRROR} names other files than those of a checkpoint")
    return files


def _check_same_run(store: StoreFolder, run: RunFolder, step: int, files: Files) -> None:
    """Raise RunError if the object store holds another run than the folder: their histories begin differently.

    files: (bytes, SHA-256) of the files of the store's checkpoint of step `step`.
    """
    if not run.history.is_file() or HISTORY not in files:
        return
    size, digest = files[HISTORY]
    if size > LIMITS["state"]:
        raise DamagedError(f"{HISTORY} is longer than a history")
    content = _read(store, f"{checkpoint_name(step)}/{HISTORY}", size)
    if _hash_of(iter([content])) != digest:
        raise DamagedError(f"{HISTORY} is damaged, its sha256 is not that of {MIRROR}")
    first, own = content.splitlines()[:1], _history_of(run.history, run).splitlines()[:1]
    if first and own and first != own:
        raise RunError(f"{store.url}: wanted the run of {run.path}, found another one; choose another --mirror")


def _restore(store: StoreFolder, run: RunFolder, step: int, files: Files) -> None:
    """Put a checkpoint of the store, and what belongs to it, into the run folder. DamagedError if a hash differs."""
    name, needed = checkpoint_name(step), sum(size for size, _ in files.values())
    if needed > (free := shutil.disk_usage(run.path).free):
        raise RunError(f"{run.path}: wanted room for the {needed} bytes of {store.url}/{name}, found {free}; make room")
    log.info("restoring %s from %s", name, store.url)
    shutil.rmtree(run.restored, ignore_errors=True)
    try:
        for file, (size, digest) in files.items():
            place = run.restored / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if _download(store, f"{name}/{file}", place, size) != digest:
                raise DamagedError(f"{file} is damaged, its sha256 is not that of {MIRROR}")
        of_run = run.restored / "run"
        _place_run_files(run, of_run)
        shutil.rmtree(of_run)
        try:
            verify_checkpoint(run.restored)
        except RunError as error:
            raise DamagedError(str(error)) from None
        for path in (p for p in run.restored.iterdir() if p.is_dir()):
            sync(path)
        final = run.checkpoints / name
        run.checkpoints.mkdir(exist_ok=True)
        if final.exists():
            set_aside(final)
        place_folder(run.restored, final)
    finally:
        shutil.rmtree(run.restored, ignore_errors=True)


def _place_run_files(run: RunFolder, theirs: Path) -> None:
    """Put config.json, metrics.jsonl and history.jsonl from the object store into the run folder.

    An existing config.json stays. Metrics and history stay if the folder's history begins with the store's.

    theirs: folder of the downloaded files.
    """
    # The settings first: a folder that has them belongs to a run, so a kill leaves one that can be resumed.
    if not run.config.is_file():
        settings = read_regular(theirs / run.config.name, "settings", within=run.path)
        write_file(run.config, settings, within=run.path)
    content = _history_of(theirs / run.history.name, run)
    if _history_of(run.history, run).startswith(content):
        return
    rows = theirs / run.metrics.name
    if rows.is_file():
        write_file(run.metrics, read_regular(rows, "metrics", within=run.path), within=run.path)
    write_file(run.history, content, within=run.path)


def _history_of(file: Path, run: RunFolder) -> bytes:
    return read_regular(file, "state", within=run.path) if file.is_file() else b""


def _read(store: StoreFolder, name: str, most: int) -> bytes:
    return _patiently(lambda: store.read(name, most), name)


def _download(store: StoreFolder, name: str, file: Path, size: int) -> str:
    def download() -> str:
        file.unlink(missing_ok=True)  # of an attempt before
        return store.download(name, file, size)

    return _patiently(download, name)


def _patiently(request: Callable[[], T], name: str = "") -> T:
    """Result of a request to the object store, repeated for `PATIENCE_S` seconds while it fails.

    It is not repeated after an error that would come again. DamagedError if the file `name` is not there, or has
    another length.
    """
    until, pause = time.monotonic() + PATIENCE_S, FIRST_PAUSE_S
    while True:
        try:
            return request()
        except StoreError as error:
            if error.wrong_file and name:
                raise DamagedError(f"{name}: {error}") from None
            if error.lasting or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
