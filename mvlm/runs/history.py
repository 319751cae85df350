"""History of a run, `history.jsonl`: the processes that trained it, and hashes of everything that was saved.

One JSON object a line, appended only, so that a run that was killed and resumed shows all of its parts:

    {"event": "start", "step": 40, "time": .., "commit": .., "precision": "bf16", "data": {split: fingerprint},
     "log_every": 1, "way": {..}, "machine": {..}, "versions": {..}}
    {"event": "save", "step": 80, "manifest": SHA-256 of the checkpoint's manifest, "metrics_bytes": ..,
     "metrics": SHA-256 of that many bytes of metrics.jsonl}

`mvlm verify` compares them with the files.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mvlm.machine import code_revision, describe_machine, package_versions
from mvlm.runs.folder import RunFolder
from mvlm.schemas import SaveEvent, StartEvent, fits
from mvlm.untrusted import json_lines, run_errors
from mvlm_dataloading.files import open_appended, sha256, sync
from mvlm_dataloading.untrusted import open_regular

START, SAVE = "start", "save"
EVENTS = {START: StartEvent, SAVE: SaveEvent}
"""Schema of each kind of event."""


class History:
    """Writer of a run's history. Rank 0 only."""

    def __init__(self, run: RunFolder) -> None:
        self._file, self._metrics = run.history, run.metrics

    def start(
        self,
        step: int,
        device: torch.device,
        ranks: int,
        precision: str,
        data: dict[str, str],
        log_every: int,
        way: dict[str, Any],
    ) -> None:
        """Append a `start` event: the step after which a process trains on, 0 for a new run, and the machine.

        OSError if it cannot be written.

        Args:
            precision: bf16 or fp32.
            data: fingerprint of each split that the run reads.
            log_every: steps between rows of metrics, which a resume may change.
            way: settings that say how steps are computed, which a resume may change too (`way_of`).
        """
        event = {"event": START, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        event |= {"commit": code_revision(), "precision": precision, "data": data}
        event |= {"log_every": log_every, "way": way}
        self._append({**event, "machine": describe_machine(device, ranks), "versions": package_versions()})

    def metrics_bytes(self) -> int:
        """Length in bytes of metrics.jsonl now; `save` takes it once the checkpoint of this moment is written."""
        return self._metrics.stat().st_size if self._metrics.is_file() else 0

    def save(self, step: int, manifest: Path, metrics_bytes: int) -> None:
        """Append a `save` event: hashes of a checkpoint's manifest and of the first `metrics_bytes` of metrics.jsonl.

        OSError if it cannot be written.

        NOTE: call it before the checkpoint is renamed into place. After a kill in between, the checkpoint would have no
        line, and would be taken for one of another run.
        """
        if metrics_bytes:
            sync(self._metrics)  # a checkpoint on the disk has its rows there, after a power cut too
        line = {"event": SAVE, "step": step, "manifest": sha256(manifest), "metrics_bytes": metrics_bytes}
        self._append({**line, "metrics": prefix_hash(self._metrics, metrics_bytes)})

    def _append(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event) + "\n").encode()
        with run_errors(), open_appended(self._file, within=self._file.parent) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = b"\n" * (file.read(1) != b"\n") + line  # a kill may have left the beginning of a line
            file.write(line)
            os.fsync(file.fileno())


def starts_of(file: Path) -> list[dict[str, Any]]:
    """The `start` events of a run's history.jsonl, in order; an empty list if there is no such file."""
    return [event for event in (read_history(file) if file.exists() else []) if event["event"] == START]


def changed_ways(events: Sequence[dict[str, Any]], before: dict[str, Any]) -> list[list[str]]:
    """For each process that trained a run, the settings that changed how steps are computed, as phrases.

    Each process is compared with the one before it. The first has none.

    Args:
        events: `start` events of the run's history, one for each process.
        before: the settings of the run, for events of older versions, which name none.
    """
    found: list[list[str]] = []
    ways = [{"ranks": e["machine"]["ranks"], "precision": e["precision"]} | (e.get("way") or {}) for e in events]
    for number, now in enumerate(ways):
        then = before | (ways[number - 1] if number else now)
        found.append([f"{name} {now[name]} in place of {then[name]}" for name in now if then.get(name) != now[name]])
    return found


def prefix_hash(file: Path, count: int) -> str:
    """SHA-256 of the first `count` bytes of a file, or of all if it has fewer; of no bytes if it does not exist."""
    digest = hashlib.sha256()
    if count and file.is_file():
        with run_errors(), open_regular(file, within=file.parent) as opened:
            while count > 0 and (block := opened.read(min(count, 1 << 20))):
                digest.update(block)
                count -= len(block)
    return digest.hexdigest()


def read_history(file: Path) -> list[dict[str, Any]]:
    """Read the events of a run's history.jsonl. Lines that are no complete event are skipped."""

    def is_event(line: dict[str, Any]) -> bool:
        schema = EVENTS.get(str(line.get("event")))
        return schema is not None and fits(line, schema)

    return [line for line in json_lines(file) if is_event(line)]
