"""Tables and curves of a report, each figure with its baseline: retrieval, cross-modal gain, a task's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mvlm.errors import RunError
from mvlm.evaluation.classification import TOP
from mvlm.evaluation.evaluate import describe_reading, describe_trivial_losses, figures_of, recall_rows
from mvlm.objectives.pretraining import OBJECTIVES
from mvlm.report.html import line_chart, series, table
from mvlm.runs.history import changed_ways

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
"""Names of a task's figures; others keep their own."""
TYPES = {
    "by_answer_type": "Accuracy by type of answer, %",
    "by_question_type": "Accuracy by type of question, %",
    "recall": "Recall of each label, %",
}
"""Titles of a task's figures that have a value for each type."""
OPTIONS = ("lengths", "iterations", "choose_by")
"""Options of an evaluation that `mvlm eval TASK` writes beside its figures, if they were given."""
RUN_CURVES = {objective.name: objective.curve for objective in OBJECTIVES}
EVALUATION_CURVES = {
    "tr_r1": "validation image to text R@1 by ITC, %",
    "ir_r1": "validation text to image R@1 by ITC, %",
    "gain_text_nats": "validation gain, text, nats per token",
    "gain_pixels_pct": "validation gain, pixels, %",
}
RECALLS = [f"{direction} R@{k}" for direction in ("image to text", "text to image") for k in (1, 5, 10)]
"""Headings of the six columns of recall."""
TASK_CURVES = {"loss": "loss", "accuracy": "accuracy of training batches, 0 to 1"}


def recalls(figures: dict[str, Any]) -> Markup:
    """A table of R@1, R@5 and R@10 in both directions, with chance."""
    rows = [
        [f"{queries}: {part['n_images']} images, {part['n_texts']} captions", how, *cells]
        for queries, part, how, cells in recall_rows(figures)
    ]
    # with all captions of an image right
    chance = [f"{min(100, 100 * k / figures['n_images']):.2f}" for k in (1, 5, 10)]
    rows.append(["chance", "", *chance, *chance])
    return table(["queries", "ranked by", *RECALLS], rows)


def objectives(figures: dict[str, Any]) -> Markup:
    """A table of cross-modal gain and masked losses, each with its baseline."""
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    nats = f"{figures['gain_text_nats']:.2f} nats per token ({text[0]:.2f} to {text[1]:.2f})"
    percent = f"{figures['gain_pixels_pct']:.2f} % ({pixels[0]:.2f} to {pixels[1]:.2f})"
    rows = [
        ["text: cross-modal gain", nats, "0 if the image does not help"],
        ["pixels: cross-modal gain", percent, "0 if the caption does not help"],
        *map(list, describe_reading(figures)),
        ["pixels: masked L1", f"{figures['masked_l1']:.4f}", describe_trivial_losses(figures)],
        ["text: masked tokens", f"{figures['masked_nats']:.3f} nats per token", ""],
    ]
    return table(["objective", "figure", "baseline"], rows)


def unseen_note(figures: dict[str, Any]) -> list[str]:
    """An explanation of the rows of unseen concepts; none if all images or none are of unseen concepts."""
    unseen = figures["unseen"]
    if unseen is None or unseen["n_images"] == figures["n_images"]:
        return []
    known = figures["n_images"] - unseen["n_images"]
    return [
        f"{known} of {figures['n_images']} images show a concept that training images show too; many of them differ "
        f"from one only in skin tone. The rows of unseen concepts count the others."
    ]


def forgetting(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on R@1 before and after training on the data of --also-evaluate, in a list; empty if there are none.

    Args:
        config: the run's settings.
        rows: rows of the run's metrics.
    """
    found = {name: value for row in rows for name, value in row.items() if name.startswith("also_")}
    parts = []
    for when in ("before", "after"):
        recalls = [found.get(f"also_{when}_{way}_r1") for way in ("tr", "ir")]
        if None not in recalls:
            parts.append(f"{' and '.join(f'{recall:.1f}' for recall in recalls)} % {when} training")
    data = config.get("also_evaluate")
    return [f"R@1 by ITC on {data}, image to text and text to image: {', '.join(parts)}."] if parts else []


def read_evaluation(file: Path, task: str, command: str) -> dict[str, Any]:
    """Figures and records that `mvlm eval TASK` wrote to a file.

    Args:
        command: command that makes the file, for errors.

    RunError if there is no such file, or it holds something else or another task's figures.
    """
    with figures_of(file, command) as found:
        name = found["task"]
        if not isinstance(found["split"], str) or not all(isinstance(r["sample"], int) for r in found["records"]):
            raise TypeError("a split and the sample of each record")
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
    names = {name for found in evaluations.values() for name, value in found.items() if _is_number(value)}
    names -= set(OPTIONS)
    first = [name for name in NAMES if name in names]
    rows = []
    for name in [*first, *sorted(names - set(first))]:
        rows.append([NAMES.get(name, name), *(_cell(found, name) for found in evaluations.values())])
    return table(["", *evaluations], rows)


def types_tables(evaluations: Mapping[str, dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(title, HTML table) of each figure that is divided by type, such as VQA accuracy by type of question."""
    found = []
    for name, title in TYPES.items():
        parts = [figures.get(name) or {} for figures in evaluations.values()]
        kinds = dict.fromkeys(kind for part in parts for kind in part)
        if list(kinds) not in ([], ["all"]):
            rows = [[kind, *(_number(part.get(kind)) for part in parts)] for kind in kinds]
            found.append((title, table(["", *evaluations], rows)))
    return found


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


def parts(events: Sequence[dict[str, Any]], config: dict[str, Any]) -> tuple[Markup | None, list[int]]:
    """HTML table of the processes that trained a run, None if only one did; and the steps at which results may change.

    These are the steps after which a process computed otherwise than the one before, such as in another precision.

    Args:
        events: `start` events of the run's history.
        config: the run's settings.
    """
    changes = changed_ways(events, config)
    rows = []
    for event, changed in zip(events, changes, strict=True):
        machine = event["machine"]
        cells = (event["step"], event["time"], machine["ranks"], machine["device"], event["precision"])
        rows.append([*map(str, cells), ", ".join(changed)])
    header = ["after step", "time", "ranks", "device", "precision", "computed otherwise than before"]
    places = [event["step"] for event, changed in zip(events, changes, strict=True) if changed and event["step"]]
    return table(header, rows) if len(rows) > 1 else None, places


def curves(
    rows: Sequence[dict[str, Any]], window: int, of_task: bool = False, places: Sequence[int] = ()
) -> list[Markup]:
    """Charts by step: losses, learning rates, gradient norm, and the evaluations if there are any.

    Figures of training steps are trailing means over `window` rows. Charts of losses are marked at the steps `places`.
    """
    charts = [
        line_chart(title, {name: series(rows, name, window)}, places=places)
        for name, title in (TASK_CURVES if of_task else RUN_CURVES).items()
        if any(name in row for row in rows)
    ]
    if of_task:
        for name in dict.fromkeys(name for row in rows for name in row if name.startswith("val_")):
            charts.append(line_chart(f"validation {name.removeprefix('val_')}", {name: series(rows, name)}))
        rates = {"cross-modality modules": series(rows, "lr"), "encoders": series(rows, "lr_encoder")}
    else:
        rates = {name: series(rows, name) for name in ("lr", "lr_muon") if any(name in row for row in rows)}
    charts.append(line_chart("learning rate", rates))
    charts.append(line_chart("gradient norm before clipping", {"grad_norm": series(rows, "grad_norm", window)}))
    if not of_task and any("tr_r1" in row for row in rows):
        recall = {"image to text": series(rows, "tr_r1"), "text to image": series(rows, "ir_r1")}
        charts.append(line_chart("validation R@1 by ITC, %", recall))
        charts.append(line_chart("validation masked L1", {"masked L1": series(rows, "masked_l1")}))
        for name in ("gain_text_nats", "gain_pixels_pct"):
            charts.append(line_chart(EVALUATION_CURVES[name], {"gain": series(rows, name)}, {"no gain": 0}))
    if any("classes_top1" in row for row in rows):
        found = {f"top-{k}": series(rows, f"classes_top{k}") for k in TOP}
        charts.append(line_chart("zero-shot classification, %", found))
    return charts
