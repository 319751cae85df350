"""Start or resume of a run in its folder: the comparison of its settings, and the checkpoint to go on from.

A resumed run goes on where its rows of metrics reach. The history has the hash of the rows that belong to a checkpoint,
so rows that a copy, an editor or a power cut has lost are noticed, and a run that ends has all of them.
"""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

from mvlm.config.groups import RunConfig
from mvlm.config.json_files import check_removed, config_json, differing_settings, read_config, with_defaults
from mvlm.errors import RunError
from mvlm.runs.checkpoint import MANIFEST, checkpoints, step_of, verify_checkpoint
from mvlm.runs.folder import RunFolder, check_usable, read_metrics
from mvlm.runs.history import SAVE, START, prefix_hash, read_history
from mvlm_dataloading.files import sha256

log = logging.getLogger(__name__)


def open_run(config: RunConfig) -> Path | None:
    """Check that the run may start in its folder or resume there. Returns the checkpoint to resume from, None to start.

    RunError if the folder holds anything that this run would overwrite, or if none of its checkpoints can be resumed.
    Nothing is changed.
    """
    out, folder = config.out, RunFolder(config.out)
    check_usable(out)
    if not folder.config.is_file():
        return None
    before = read_config(folder.config)
    check_removed(before, str(folder.config))
    check_removed(before.get("model") or {}, str(folder.config), "model.")
    differing = differing_settings(with_defaults(before, type(config)), config_json(config))
    # Checkpoints are read in place of the pretrained model, wherever that is now, and tell what the task was.
    if checkpoints(folder.checkpoints):
        differing = [setting for setting in differing if setting[0] != "checkpoint" and not _moved_code(*setting)]
    if config.extend_to is not None:  # `mvlm.training.extension` has compared the ends
        differing = [setting for setting in differing if setting[0] not in ("max_steps", "extensions")]
    if differing:
        settings = "; ".join(f"{name}: config.json has {a}, this command {b}" for name, a, b in differing)
        raise RunError(
            f"{out}: wanted the settings of the run in this folder, got others ({settings}); "
            f"use the same settings or choose another --out"
        )
    if not config.resume:
        raise RunError(f"{out}: holds this run already; continue it with --resume, or choose another --out")
    return checkpoint_to_resume(folder, config.max_steps)


def checkpoint_to_resume(run: RunFolder, last: int) -> Path | None:
    """Newest checkpoint whose files match its manifest and whose rows of metrics are there; None if there is none yet.

    Warnings say which newer ones are damaged, and which rows are missing and will be made again. A checkpoint of the
    `last` step is taken in any case: such a run is complete.

    RunError if there are checkpoints and none can be resumed, PermissionError for one that may not be read.
    """
    found, missing = checkpoints(run.checkpoints), ""
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except RunError as error:
            log.warning("%s; looking for an older checkpoint", error)
            continue
        lost = missing_rows(run, path)
        if lost and step_of(path) >= last:
            log.warning(
                "%s: wanted all rows of the complete run, found none %s; restore the file, or move %s away and resume, "
                "which makes them again",
                run.metrics, lost, path,
            )  # fmt: skip
        elif lost:
            missing = missing or f"wanted the rows up to the checkpoint of step {step_of(path)}, found none {lost}"
            continue
        elif missing:
            log.warning("%s: %s; they are made again, after step %d", run.metrics, missing, step_of(path))
        return path
    if missing:
        raise RunError(
            f"{run.metrics}: {missing}, and no older checkpoint whose rows are all there; restore the file, or move "
            f"{run.history.name} away to go on without them: `mvlm verify` will then refuse the run"
        )
    if found:
        raise RunError(
            f"{run.path}: wanted a good checkpoint, found all of them damaged; remove the folder to start again, or "
            f"restore one"
        )
    return None


def missing_rows(run: RunFolder, checkpoint: Path) -> str:
    """Message on rows of metrics that existed when a checkpoint was saved and are gone; empty if none are.

    It is empty too if the run has no history, or one that does not name the checkpoint. Rows that are all there with
    another text than then cause a warning.
    """
    events = read_history(run.history) if run.history.exists() else []
    manifest, step = sha256(checkpoint / MANIFEST), step_of(checkpoint)
    saved = [i for i, event in enumerate(events) if event["event"] == SAVE and event["manifest"] == manifest]
    if not saved:
        return ""
    save = events[saved[-1]]
    if prefix_hash(run.metrics, save["metrics_bytes"]) == save["metrics"]:
        return ""
    there = {row["step"] for row in read_metrics(run.metrics, step)} if run.metrics.exists() else set()
    due = rows_due(events[: saved[-1]], step, read_config(run.config).get("log_every"))
    if gone := [i for i, row in enumerate(due) if row not in there]:
        ends = [place for place, (a, b) in enumerate(pairwise(gone), 1) if b - a > 1]
        parts = [gone[a:b] for a, b in pairwise([0, *ends, len(gone)])]
        words = [f"{due[part[0]]} to {due[part[-1]]}" if len(part) > 1 else f"{due[part[0]]}" for part in parts]
        return f"of step{'s' * (len(gone) > 1)} {', '.join(words[:3])}{' and more' * (len(words) > 3)}"
    if max(there, default=0) < step and _length(run.metrics) < save["metrics_bytes"]:
        return f"after step {max(there, default=0)}"  # of an evaluation or a stop, between those that are due
    log.warning(
        "%s: the rows up to step %d are not those that were saved with its checkpoint, and `mvlm verify` will say so; "
        "restore the file",
        run.metrics, step,
    )  # fmt: skip
    return ""


def rows_due(events: list[dict[str, Any]], step: int, log_every: Any) -> list[int]:
    """Steps up to `step` of which metrics.jsonl must have a row, ascending: every `log_every` steps of each process.

    Args:
        events: events of the run's history up to that step; each `start` is that of a process.
        log_every: setting of the run, for processes of older versions, which do not name theirs.
    """
    found: list[int] = []
    for part in reversed([event for event in events if event["event"] == START]):
        every = part.get("log_every", log_every)
        if isinstance(every, int) and every > 0:
            found += reversed(range((part["step"] // every + 1) * every, step + 1, every))
        step = min(step, part["step"])
    return found[::-1]


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _moved_code(name: str, before: Any, now: Any) -> bool:
    """True if a setting that names a file of the user's own code has changed by the file's folder alone.

    The hash of the file is compared elsewhere: of a task by `FineTuner.restore`, of a function as a setting of its own.
    """
    paths = Path(str(before)), Path(str(now))
    endings = {"task": (".py",), "own_loss": (".py:",), "own_masks": (".py:",)}
    return paths[0].name == paths[1].name and any(ending in paths[1].name for ending in endings.get(name, ()))
