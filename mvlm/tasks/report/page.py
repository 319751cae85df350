"""The page about a fine-tuned run of one task: one HTML file with its images inside, readable offline."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.files import check_folder
from mvlm.inference.trained_model import hash_of
from mvlm.report.charts import line_chart, series
from mvlm.report.comparison import metrics_of
from mvlm.report.html import write_page
from mvlm.report.page import attribution, settings
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import RunFolder, find_checkpoint
from mvlm.tasks.registry import TASKS, load_task
from mvlm.tasks.report.examples import MOST_WORDS, SHOWN, task_examples
from mvlm.tasks.report.figures import (
    OPTIONS,
    confusion_table,
    figures_table,
    options_note,
    other_evaluations,
    read_evaluation,
    types_tables,
)
from mvlm.tasks.report.verdicts import JUDGES, Verdict, confusion, majority
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset, open_dataset


def write_task_report(run: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Write the page of a fine-tuned run that has a checkpoint and an evaluation with records. Returns the file.

    The page of a task of the user's own has no examples and no confusion.

    Args:
        run: The run folder.
        data: Folder of shards for the examples. Default: the one that the run was evaluated on.
        out: File to write. Default: `report.html` in the run folder.

    Raises:
        RunError: the folder is no run of a task, has no checkpoint, no metrics, or no evaluation of its task; or
            the data are not those of the evaluation.
    """
    check_folder(run, "a run folder")
    folder = RunFolder(run)
    config = read_config(folder.config)
    described = read_state(find_checkpoint(run)).get("task")
    if described is None:
        raise RunError(f"{run}: wanted a fine-tuned run, found a pretraining run; choose another run")
    name, file = described["name"], folder.evaluation
    command = f"mvlm eval {config['task']} --checkpoint {run} --data {data or config['data']} --out {file}"
    figures = read_evaluation(file, name, command)
    rows = metrics_of(folder)
    evaluations = {file.stem: figures, **other_evaluations(file, name)}
    split = open_dataset(data or Path(str(figures.get("data", config["data"]))), figures["split"])
    task, now = None, ""  # code of a task of the user's own is not run here
    if name in TASKS:
        task, tokenizer = load_task(run, "cpu", **{key: figures[key] for key in OPTIONS if key in figures})
        now = hash_of(task.config, tokenizer, task)
    window = max(1, len(rows) // 60)
    return write_page(
        out or folder.report,
        "task.html",
        title=run.name,
        task=name,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        split=figures["split"],
        checkpoint=figures.get("checkpoint", run),
        options=options_note(figures),
        figures=figures_table(evaluations),
        # Figures of an earlier version name no model.
        stale=[stem for stem, found in evaluations.items() if task and found.get("model", now) != now],
        types=types_tables(evaluations),
        window=window,
        curves=task_curves(rows, window),
        most_words=MOST_WORDS,
        shown=SHOWN,
        settings=settings(config),
        attribution=attribution(split.description),
        **(_samples(task, file, figures, split) if task else {"verdicts": None}),
    )


def _samples(task: Task, file: Path, figures: dict[str, Any], split: Dataset) -> dict[str, Any]:
    """Parts of the page that are about samples: examples, confusion and the majority's figure."""
    name = task.name
    verdicts = judged(name, task.main, file, figures, split)
    counts = confusion(name, verdicts)
    return {
        "verdicts": verdicts,
        "blind": task.options.blind,
        "majority": majority(name, verdicts, split),
        "confusion": confusion_table(counts) if counts else None,
        "groups": [(right, task_examples(task, verdicts, right, split)) for right in (True, False)],
    }


def judged(name: str, main: str, file: Path, figures: dict[str, Any], split: Dataset) -> list[Verdict]:
    """Verdict of each record. RunError unless their mean is the evaluation's main figure: the data are others then."""
    records = figures["records"]
    same = [record["sample"] for record in records] == list(range(len(split)))
    try:
        verdicts = JUDGES[name](records, split) if same else []
        equal = same and abs(fmean(v.score for v in verdicts) - figures[main]) < 1e-6
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: wanted the records of {name}, got {error!r}; evaluate the run again") from None
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
