"""The folder of a run: who may write to it, its configuration, and its metrics (docs/files.md)."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config
from mvlm.config.pretrain import FORMAT_VERSION, PretrainConfig
from mvlm.errors import RunError
from mvlm.runs.checkpoint import checkpoints, newest_good_checkpoint, sync, write_json

PARTIAL_CONFIG = ".config.json.partial"  # a kill may leave one
# Settings that change where, how fast or how often, but not what is computed: a resumed run may differ in them.
FREE_SETTINGS = (
    "resume",
    "out",
    "data",  # the loader's fingerprint decides whether it is the same data
    "device",
    "log_every",
    "eval_every_steps",
    "checkpoint_every_minutes",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_every_steps",
    "eval_every_minutes",
    "max_bad_steps",
    "preemption_file",
    "stall_minutes",
    "wandb",
    "trackio",
)


class RunLock:
    """Keeps a run folder for this process until it is closed, or until the process ends in whatever way.

    The folder is made where there is none. RunError when another process holds it, or it is no folder.
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
    """Check that the run may be begun in its folder or resumed. Returns the checkpoint to go on from, None to start.

    RunError when the folder holds anything that this run would spoil. Nothing is changed.
    """
    out, file = config.out, config.out / "config.json"
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: wanted a folder for the run, found a file; choose another --out")
    if file.is_file():
        differing = differing_settings(read_config(file), plain_settings(config))
        if differing:
            raise RunError(f"{out}: holds a different run ({'; '.join(differing)}); choose another --out")
        if not config.resume:
            raise RunError(f"{out}: holds this run already; go on with --resume, or choose another --out")
        checkpoint = newest_good_checkpoint(out / "checkpoints")
        if checkpoint is None and checkpoints(out / "checkpoints"):
            raise RunError(f"{out}: no checkpoint is whole; remove the folder to start again, or restore one")
        return checkpoint
    if out.is_dir() and any(path.name != PARTIAL_CONFIG for path in out.iterdir()):
        raise RunError(f"{out}: wanted an empty folder or a run, found other files; choose another --out")
    return None


def plain_settings(config: PretrainConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(config.to_dict()))}


def write_config(config: PretrainConfig) -> None:
    """Make the folder that `open_run` looked at a run's: config.json, whole or not at all. One that is there stays.

    To be called when the run has been put together: a folder with a config.json is taken by that run.
    """
    file, aside = config.out / "config.json", config.out / PARTIAL_CONFIG
    if file.is_file():
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(aside, plain_settings(config))
    sync(aside)
    aside.replace(file)
    sync(config.out)


def differing_settings(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """ "name: there A, here B" for every setting that changes what a run computes."""
    found = []
    for name in sorted(set(there) | set(here)):
        if not prefix and name in FREE_SETTINGS:
            continue
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_settings(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: there {a}, here {b}")
    return found


class MetricsFile:
    """metrics.jsonl: one JSON object a line. Opened to go on after `step`, it drops the lines of later steps."""

    def __init__(self, path: Path, step: int) -> None:
        kept = read_metrics(path, step) if path.is_file() else []
        aside = path.with_name(f".{path.name}.partial")  # a crash here leaves the old file as it was
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.replace(path)
        self._file = path.open("ab", buffering=0)  # what a failed write left in a buffer would be written later
        self._whole = path.stat().st_size

    def write(self, row: dict[str, Any]) -> None:
        """Add a line. OSError where it cannot be written, as on a full disk; nothing of it is there then."""
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
    """The rows of a metrics.jsonl, up to `last_step`. A line that is no row, as a crash may cut one, is left out."""
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
