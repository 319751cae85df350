"""The folder of a run: names of its files, its lock, its configuration and its metrics (docs/reference/files.md)."""

import json
import logging
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from mvlm.config.groups import RunConfig
from mvlm.config.json_files import config_json, read_config
from mvlm.errors import RunError
from mvlm.files import LOCK, check_folder, lock_folder
from mvlm.runs.checkpoint import MANIFEST, checkpoints, newest_good_checkpoint, step_of, verify_checkpoint
from mvlm.schemas import MetricsRow, MetricsValues, RunSettings, fits
from mvlm.untrusted import json_lines, read_json, run_errors
from mvlm_dataloading.files import aside_of, open_appended, write_file, write_json
from mvlm_dataloading.untrusted import check_links

log = logging.getLogger(__name__)


class RunFolder:
    """Paths of a run's files. Nothing is read or made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        """Resolved configuration. A folder that has it belongs to a run."""
        self.lock = path / LOCK
        """Empty file that is locked while a process works on the run. It stays when the run ends."""
        self.metrics = path / "metrics.jsonl"
        """Rows of metrics, one JSON object per line."""
        self.history = path / "history.jsonl"
        """Processes that trained the run, with their steps, and hashes of what was saved (`mvlm.runs.history`)."""
        self.checkpoints = path / "checkpoints"
        """Folder of checkpoints."""
        self.evaluation = path / "eval" / "test.json"
        """Figures on the test split."""
        self.evaluation_files = path / ".evaluation"
        """Folder of the features of an evaluation during training, while it lasts."""
        self.failed_step = path / "failed_step"
        """The first step whose loss or gradient was not finite, to be repeated (`mvlm.training.failed_step`)."""
        self.restored = path / ".restored"
        """Folder of a checkpoint while it is read back from an object store."""
        self.strips = path / "strips"
        """Folder of reconstruction strips."""
        self.tensorboard = path / "tensorboard"
        """Folder of TensorBoard events."""
        self.report = path / "report.html"
        """HTML report on the run."""
        self.comparison = path / "compare.html"
        """HTML comparison of this run with others."""

    def stalled(self, rank: int) -> Path:
        """File for the stack traces of a rank's threads, which the watchdog writes before it ends a hung process."""
        return self.path / f"stalled_rank_{rank:05d}.txt"

    def evaluation_command(self, data: Path, task: str = "retrieval", split: str = "test") -> str:
        """The `mvlm eval` command line, as text for a message, that writes the evaluation which `mvlm report` reads."""
        words = ["mvlm", "eval", task, "--checkpoint", self.path, "--data", data, "--out", self.evaluation]
        return shlex.join(map(str, words if split == "test" else [*words, "--split", split]))


def find_run(source: Path) -> RunFolder | None:
    """The run that `source`, a run or one of its checkpoints, belongs to; None if it is neither."""
    places = (RunFolder(folder) for folder in (source, *source.absolute().parents[:2]))
    # An exported folder has a config.json of its own, but no checkpoints.
    return next((run for run in places if run.config.is_file() and run.checkpoints.is_dir()), None)


def check_run_folder(path: Path) -> None:
    """Raise RunError if `path` is no folder, or if a link in it leads out of it."""
    check_folder(path, "a run folder")
    with run_errors():
        check_links(path)


class RunLock:
    """Exclusive lock on a run folder, held until it is closed or the process ends, even by kill -9.

    The folder and those above it are made if there are none. They and the lock are removed if no run has begun at the
    end.

    RunError if another process holds the lock, or if `out` cannot hold a run.
    """

    def __init__(self, out: Path) -> None:
        check_usable(out)  # first, so that a folder of other files gets no lock file
        self._folder, self._made = RunFolder(out), [path for path in (out, *out.parents) if not path.exists()]
        self._held = lock_folder(out)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._folder.config.exists():  # the run was refused: leave nothing behind
            self._folder.lock.unlink(missing_ok=True)  # while it is held, so that no process gets it in between
            with suppress(OSError):  # another process uses the folder
                for path in self._made:
                    path.rmdir()
        self._held.__exit__(None, None, None)


def check_usable(out: Path) -> None:
    """Raise RunError unless `out` is a run folder, an empty folder, or not there."""
    folder = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: wanted a folder for the run, found a file; choose another --out")
    if out.is_dir():
        check_run_folder(out)
    # A service such as W&B starts before config.json is written, and leaves its files if the run then cannot start.
    ours = (aside_of(folder.config), folder.lock, folder.restored, out / "wandb")
    if out.is_dir() and not folder.config.is_file() and any(path not in ours for path in out.iterdir()):
        raise RunError(f"{out}: wanted an empty folder or a run, found other files; choose another --out")


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that `path` names: itself, or the newest good one of a run folder.

    RunError without one, PermissionError for one that may not be read.
    """
    with run_errors():
        if (path / MANIFEST).exists():
            verify_checkpoint(path)
            return path
        check_folder(path, "a run, a checkpoint or an exported folder")
        check_links(path)
    root = RunFolder(path).checkpoints
    found = newest_good_checkpoint(root)
    if found is not None:
        return found
    damaged = len(checkpoints(root))
    if damaged:
        raise RunError(f"{path}: wanted a good checkpoint, found {damaged} damaged, as listed above; use another run")
    raise RunError(
        f"{path}: wanted a run, a checkpoint or an exported folder, found no finished checkpoint (checkpoints/step_*), "
        f"no manifest.json, and no model.safetensors with a config.json; check the path"
    )


def log_unfinished(run: Path, checkpoint: Path) -> None:
    """Log how far a run has come if `checkpoint`, its newest, is not of its last step.

    Nothing is logged if `run` is itself a checkpoint.
    """
    try:
        steps = read_json(RunFolder(run).config, "settings", "the configuration of a run", RunSettings)["max_steps"]
    except (OSError, RunError, KeyError):
        return  # a checkpoint, or a damaged file, which is not needed here
    if isinstance(steps, int) and step_of(checkpoint) < steps:
        log.warning("%s: the run has not finished; this is its step %d of %d", run, step_of(checkpoint), steps)


def write_config(config: RunConfig) -> None:
    """Write a run's settings to config.json, atomically: from then on the folder belongs to this run.

    In an existing file only the number of steps and the record of its extensions are replaced, if the number has
    changed. Call it once the run has been set up without an error.
    """
    folder = RunFolder(config.out)
    if folder.config.is_file():
        values = read_config(folder.config)
        if values.get("max_steps") != config.max_steps:  # open_run has compared them
            ends = {name: config_json(config)[name] for name in ("max_steps", "extensions")}
            write_json(folder.config, values | ends, within=config.out)
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config_json(config), within=config.out)


class MetricsFile:
    """Writer of metrics.jsonl, one JSON object per line. Opening it drops the rows of steps after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        found = read_metrics(path) if path.exists() else []
        kept = [row for row in found if row["step"] <= step]
        times = [row["seconds"] for row in found if isinstance(row.get("seconds"), float)]
        self.seconds = max(times, default=0.0)
        """Seconds that the run has trained so far, those of dropped rows included."""
        with run_errors():
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept), within=path.parent)
            self._file = open_appended(path, within=path.parent)
        self._complete_bytes = path.stat().st_size
        """Length of the file up to its last complete line."""

    def write(self, row: dict[str, Any]) -> None:
        """Append a complete line, or nothing. OSError if it cannot be written, for example on a full disk."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._complete_bytes)
            raise
        self._complete_bytes += written

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl up to step `last_step`. Lines that are no complete row are skipped."""
    rows = [row for row in json_lines(path) if fits(row, MetricsRow) and fits(row, MetricsValues)]
    return rows if last_step is None else [row for row in rows if row["step"] <= last_step]
