"""The folder of a run: its files, its lock, its configuration and its metrics (docs/files.md)."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.config.json_files import config_json, differing_settings, read_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import RunError
from mvlm.files import sync, write_json
from mvlm.runs.checkpoint import checkpoints, newest_good_checkpoint

PARTIAL_CONFIG = ".config.json.partial"  # a kill may leave one


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run's files. Nothing is read or made."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a row of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Figures on the test split."""
        return self.path / "eval" / "test.json"

    @property
    def strips(self) -> Path:
        """Folder of reconstruction strips."""
        return self.path / "strips"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The run's HTML report."""
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        """The HTML comparison of this run with others."""
        return self.path / "compare.html"

    def stalled(self, rank: int) -> Path:
        """The stacks of a rank's threads, written when the watchdog ends it."""
        return self.path / f"stalled_rank_{rank:05d}.txt"


class RunLock:
    """Exclusive lock on a run folder, held until it is closed or the process ends, by whatever means.

    Makes the folder if there is none. RunError when another process holds the lock, or when `out` is a file.
    """

    def __init__(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise RunError(f"{out}: wanted a folder for the run, found a file; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise RunError(
                f"{out}: wanted a run folder of our own, found it in use by another process; "
                f"wait for that run, stop it, or choose another --out"
            ) from None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def open_run(config: PretrainConfig) -> Path | None:
    """Check that the run may start in its folder or resume there. Returns the checkpoint to resume from, None to start.

    RunError when the folder holds anything that this run would overwrite. Nothing is changed.
    """
    out, folder = config.out, RunFolder(config.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: wanted a folder for the run, found a file; choose another --out")
    if folder.config.is_file():
        differing = differing_settings(read_config(folder.config), config_json(config))
        if differing:
            raise RunError(f"{out}: holds a different run ({'; '.join(differing)}); choose another --out")
        if not config.resume:
            raise RunError(f"{out}: holds this run already; go on with --resume, or choose another --out")
        checkpoint = newest_good_checkpoint(folder.checkpoints)
        if checkpoint is None and checkpoints(folder.checkpoints):
            raise RunError(f"{out}: no checkpoint is whole; remove the folder to start again, or restore one")
        return checkpoint
    if out.is_dir() and any(path.name != PARTIAL_CONFIG for path in out.iterdir()):
        raise RunError(f"{out}: wanted an empty folder or a run, found other files; choose another --out")
    return None


def write_config(config: PretrainConfig) -> None:
    """Write config.json atomically; this claims the folder for the run. An existing file is kept.

    Call it once the run has been set up without an error: a folder with a config.json belongs to that run.
    """
    file, aside = RunFolder(config.out).config, config.out / PARTIAL_CONFIG
    if file.is_file():
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(aside, config_json(config))
    sync(aside)
    aside.replace(file)
    sync(config.out)


class MetricsFile:
    """Writer of metrics.jsonl: one JSON object a line. Lines of steps after `step` are dropped when it is opened."""

    def __init__(self, path: Path, step: int) -> None:
        kept = read_metrics(path, step) if path.is_file() else []
        aside = path.with_name(f".{path.name}.partial")  # a crash here leaves the old file as it was
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.replace(path)
        self._file = path.open("ab", buffering=0)  # a buffer would write the rest of a failed line later
        self._whole = path.stat().st_size

    def write(self, row: dict[str, Any]) -> None:
        """Add a line, whole or not at all. OSError where it cannot be written, as on a full disk."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._whole)
            raise
        self._whole += written

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to `last_step`. Lines that are not rows, as a crash leaves them, are skipped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        if last_step is None or row["step"] <= last_step:
            rows.append(row)
    return rows
