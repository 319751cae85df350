"""Tables and curves of a task's report: figures with their intervals, figures by type, confusion; verdicts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from mvlm.errors import RunError
from mvlm.report.charts import line_chart, series
from mvlm.report.html import render, table
from mvlm.report.verdicts import Confusion
from mvlm.tasks.task import Task, Verdict
from mvlm_dataloading import Dataset

NAMES = {
    "accuracy": "accuracy, %",
    "mean_per_class_recall": "mean per-class recall, %",
    "consistency": "consistency, %",
    "majority": "baseline: always the majority's label, %",
    "cider_d": "CIDEr-D x 100",
    **{f"bleu_{n}": f"BLEU-{n} x 100" for n in range(1, 5)},
    "equal": "equal to a reference, %",
    "fact_precision": "facts: precision, %",
    "fact_recall": "facts: recall, %",
    "fact_f1": "facts: F1, %",
}
"""Names of figures; others keep their own."""
TYPES = {
    "by_answer_type": "Accuracy by type of answer, %",
    "by_question_type": "Accuracy by type of question, %",
    "recall": "Recall of each label, %",
}
"""Titles of figures that have a value for each type."""
OPTIONS = ("lengths", "iterations", "choose_by")
"""Options of an evaluation that `mvlm eval TASK` writes beside its figures, if they were given."""


def read_evaluation(file: Path, task: str, command: str) -> dict[str, Any]:
    """Figures and records that `mvlm eval TASK` wrote to a file.

    Args:
        command: command that makes the file, for errors.

    RunError if there is no such file, or it holds something else or another task's figures.
    """
    if not file.is_file():
        raise RunError(f"{file}: wanted the run's evaluation, found none; first run `{command}`")
    try:
        found = json.loads(file.read_text())
        name = found["task"]
        if not isinstance(found["split"], str) or not all(isinstance(r["sample"], int) for r in found["records"]):
            raise TypeError("a split and the sample of each record")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file}: wanted an evaluation of {task}, got {error!r}; run `{command}`") from None
    if name != task:
        raise RunError(f"{file}: wanted an evaluation of {task}, found one of {name}; run `{command}`")
    return found


def other_evaluations(main: Path, task: str) -> dict[str, dict[str, Any]]:
    """Further evaluations of the task beside the main one, by the names of their files. Other files are left out."""
    found = {}
    for file in sorted(main.parent.glob("*.json")):
        if file != main:
            try:
                found[file.stem] = read_evaluation(file, task, "")
            except RunError:
                continue
    return found


def figures_table(evaluations: Mapping[str, dict[str, Any]]) -> Markup:
    """A row for each figure and a column for each evaluation; 95 % intervals in brackets."""
    names = dict.fromkeys(
        name for found in evaluations.values() for name, value in found.items() if _is_number(value)
    ).keys() - set(OPTIONS)
    first = [name for name in NAMES if name in names]
    rows = []
    for name in [*first, *sorted(names - set(first))]:
        rows.append([NAMES.get(name, name), *(_cell(found, name) for found in evaluations.values())])
    return table(["", *evaluations], rows)


def types_tables(evaluations: Mapping[str, dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Title and table of each figure that has values for types."""
    found = []
    for name, title in TYPES.items():
        parts = [figures.get(name) or {} for figures in evaluations.values()]
        kinds = dict.fromkeys(kind for part in parts for kind in part)
        if list(kinds) not in ([], ["all"]):
            rows = [[kind, *(_number(part.get(kind)) for part in parts)] for kind in kinds]
            found.append((title, table(["", *evaluations], rows)))
    return found


def confusion_table(found: Confusion) -> Markup:
    """Counts, each shaded by its share of the row."""
    rows = []
    for label, counts in zip(found.labels, found.counts, strict=True):
        total = max(1, sum(counts))
        rows.append((label, [(count, round(60 * count / total)) for count in counts]))
    return render("confusion.html", labels=found.labels, rows=rows)


def options_note(figures: Mapping[str, Any]) -> str:
    """Options of the evaluation in words; empty if none was given."""
    given = [f"{name} {json.dumps(figures[name])}" for name in OPTIONS if name in figures]
    return f"Evaluated with {', '.join(given)}." if given else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _cell(figures: Mapping[str, Any], name: str) -> str:
    interval = figures.get(f"{name}_95")
    text = _number(figures.get(name))
    return f"{text} ({_number(interval[0])} to {_number(interval[1])})" if interval else text


def judged(task: Task, file: Path, figures: dict[str, Any], split: Dataset) -> list[Verdict]:
    """Verdict of each record. RunError unless their mean is the evaluation's main figure: the data are others then."""
    records = figures["records"]
    same = [record["sample"] for record in records] == list(range(len(split)))
    try:
        verdicts = (task.judge(records, split) or []) if same else []
        equal = same and abs(fmean(v.score for v in verdicts) - figures[task.main]) < 1e-6
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: wanted the records of {task.name}, got {error!r}; evaluate the run again") from None
    if not equal:
        raise RunError(
            f"{file}: wanted the records of the split {split.split} of {split.folder}, found those of other data; "
            f"evaluate the run again, or name its data with --data"
        )
    return verdicts


def task_curves(rows: Sequence[dict[str, Any]], window: int) -> list[Markup]:
    """Charts by step: loss, accuracy, each validation figure, learning rate, gradient norm.

    Those of training steps are trailing means over `window` rows.
    """
    titles = {"loss": "loss", "accuracy": "accuracy of training batches, 0 to 1"}
    charts = [line_chart(title, {name: series(rows, name, window)}) for name, title in titles.items()]
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("val_")):
        charts.append(line_chart(f"validation {name.removeprefix('val_')}", {name: series(rows, name)}))
    rates = {"cross-modality modules": series(rows, "lr"), "encoders": series(rows, "lr_encoder")}
    charts.append(line_chart("learning rate", rates))
    charts.append(line_chart("gradient norm before clipping", {"grad_norm": series(rows, "grad_norm", window)}))
    return charts
