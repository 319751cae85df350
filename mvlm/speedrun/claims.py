"""Claims of a finished run: everything that its folder says about itself, read and not yet believed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config, run_config
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.runs.checkpoint import checkpoints, step_of
from mvlm.runs.folder import RunFolder, read_metrics
from mvlm.runs.history import START, read_history

MEASURED = ("pairs_per_s", "data_wait_s", "seconds", "memory_mb", "mfu")
"""Fields of a row of metrics that no two runs share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """Files of a finished run, parsed."""

    run: RunFolder
    config: PretrainConfig
    """Its config.json, with the folder of the data that it is verified on."""
    rows: list[dict[str, Any]]
    """Rows of metrics, in the order of the file."""
    parts: list[dict[str, Any]]
    """`start` events of the history, in order: one for each process that trained."""
    saves: dict[int, dict[str, Any]]
    """`save` events of the history by step, without those that a later part went back behind."""
    gaps: list[int]
    """Steps after which a part went on though no part before it had saved them."""
    kept: list[Path]
    """Checkpoints, oldest first. The last is that of the last step."""
    figures: dict[str, Any] | None
    """Its eval/test.json; None without one."""

    def part_of(self, step: int) -> dict[str, Any]:
        """The `start` event of the process that made a step, from 1."""
        return next(part for part in reversed(self.parts) if part["step"] < step)

    def row_due(self, step: int) -> bool:
        """True if a step has a row of metrics. Parts may differ in `log_every`; older histories do not name it."""
        every = self.part_of(step).get("log_every")
        every = every if isinstance(every, int) and every > 0 else self.config.log_every
        return step % every == 0 or step == self.config.max_steps


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None: a note, such as steps that were not replayed."""
    text: str

    def __str__(self) -> str:
        word = {True: "yes", False: "no", None: "-"}[self.passed]
        return f"{word:<4} {self.name:<12} {self.text}"


def verdict(name: str, problems: list[str], text: str) -> Check:
    """A check that passes, with `text`, if there are no problems; else the first three of them are its text."""
    if not problems:
        return Check(name, True, text)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return Check(name, False, "; ".join(problems[:3]) + more)


def read_claims(path: Path, data: Path | None) -> Claims:
    """Read the folder of a finished pretraining run; `data` replaces the folder of its data.

    RunError if the run is missing, not finished, not a pretraining run, or older than the history of runs.
    """
    check_folder(path, "the folder of a finished run")
    run = RunFolder(path)
    values = read_config(run.config)
    if "task" in values:
        raise RunError(f"{path}: wanted a pretraining run, found one of fine-tuning; only pretraining can be replayed")
    config = run_config(values, str(run.config))
    for file in (run.metrics, run.history):
        if not file.is_file():
            raise RunError(
                f"{file}: wanted the {file.stem} of the run, found no such file; restore it, or train again with this "
                f"version of mvlm"
            )
    kept, events = checkpoints(run.checkpoints), read_history(run.history)
    reached = step_of(kept[-1]) if kept else 0
    if reached < config.max_steps:
        raise RunError(
            f"{path}: wanted a finished run, a checkpoint of step {config.max_steps}, found step {reached}; "
            f"finish it with --resume"
        )
    parts, saves, gaps = [], {}, []
    for event in events:
        if event["event"] == START:
            parts.append(event)
            gaps += [event["step"]] if event["step"] not in {0, *saves} else []
            saves = {step: save for step, save in saves.items() if step <= event["step"]}
        else:
            saves[event["step"]] = event
    if not all(_is_count(part["machine"].get("threads")) and part["precision"] in ("fp32", "bf16") for part in parts):
        raise RunError(f"{run.history}: wanted the threads and the precision of each part, found others; restore it")
    if not parts or parts[0]["step"] != 0:
        raise RunError(f"{run.history}: wanted a history that begins with the start of the run, found none; restore it")
    return Claims(
        run=run,
        config=replace(config, out=path, data=data or config.data),
        rows=read_metrics(run.metrics),
        parts=parts,
        saves=saves,
        gaps=gaps,
        kept=kept,
        figures=_read_figures(run.evaluation),
    )


def _read_figures(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        figures = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: wanted the figures of `mvlm eval retrieval`, got {error}; evaluate again") from None
    if not isinstance(figures, dict):
        raise RunError(f"{file}: wanted the figures of `mvlm eval retrieval`, got {figures!r}; evaluate again")
    machine = figures.get("machine", {})
    wanted = {
        "rerank": _is_count(figures.get("rerank", 1), least=0),  # 0: a model without ITM
        "precision": figures.get("precision", "fp32") in ("fp32", "bf16"),
        "machine": isinstance(machine, dict) and _is_count(machine.get("threads", 1)),
    }
    for name, good in wanted.items():
        if not good:
            raise RunError(
                f"{file}: wanted the figures of `mvlm eval retrieval`, got {name} {figures[name]!r}; evaluate again"
            )
    return figures


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
