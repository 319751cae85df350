"""Scores of a file of predictions against a file of references, for every task: no model, no torch.

Formats are the published ones, so that predictions of any model can be scored (docs/guides/tasks.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvlm.errors import ConfigError, RunError
from mvlm.statistics import grouped_bootstrap, mcnemar
from mvlm.tasks.metrics.captions import bleu, cider
from mvlm.tasks.metrics.classification import classification_figures
from mvlm.tasks.metrics.facts import fact_figures, is_scene
from mvlm.tasks.metrics.pairs import check_identifier, nlvr_figures, set_of
from mvlm.tasks.metrics.pointing import box_contains, pointing_figures
from mvlm.tasks.metrics.vqa import answer_fault, vqa_accuracy, warn_of_few_answers
from mvlm.tasks.records import by_id, filled, listed, match_ids, numbers, read_csv, read_json, read_json_lines, typed
from mvlm_dataloading.dataset.dataset import image_name

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
FLICKR_IDS = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")
"""Names of the image's field in the releases of SNLI-VE."""


@dataclass(frozen=True)
class Scored:
    """Figures of predictions, and the score of each example behind the main one."""

    figures: dict[str, Any]
    """Figures by name, in per cent unless their name says otherwise."""
    main: str
    """Name of the figure by which models are compared and selected."""
    ids: list[str]
    """Id of each example."""
    scores: np.ndarray
    """float64 (examples,): score of each in 0..1 (CIDEr-D: 0..10)."""
    groups: list[str]
    """The image, or the sentence, of each example. Intervals are bootstrapped over these."""


def _vqa(predictions: Path, references: Path) -> Scored:
    results = read_json(predictions, "a list of {question_id, answer}")
    rows = results if isinstance(results, list) else []
    answers = by_id(predictions, rows, "question_id", lambda r: typed(r, "answer", str))
    wanted = "VQA annotations, an object with the list `annotations`"
    rows = listed(references, read_json(references, wanted), "annotations", wanted)
    annotations = by_id(references, rows, "question_id", lambda r: {**r, "answers": _answers(r)})
    match_ids(predictions, answers, annotations)
    records = [{**record, "question_id": key} for key, record in annotations.items()]
    warn_of_few_answers(records)
    figures = vqa_accuracy(answers, records)
    groups = [image_name(record) or str(record["question_id"]) for record in records]
    return Scored(figures, "accuracy", list(annotations), figures.pop("scores"), groups)


def _answers(record: Mapping[str, Any]) -> list[Any]:
    """The answers of a question, each an object with a text."""
    answers = filled(record, "answers")
    if fault := answer_fault(answers):
        raise ValueError(fault)
    return answers


def _truth(path: Path, text: Any) -> bool:
    if str(text).lower() not in ("true", "false"):
        raise RunError(f"{path}: wanted the label True or False, found {text!r}")
    return str(text).lower() == "true"


def _pairs(predictions: Path, references: Path) -> Scored:
    rows = [{"identifier": i, "label": x} for i, x in read_csv(predictions, 2, "rows `identifier,prediction`")]
    found = by_id(predictions, rows, "identifier", lambda r: _truth(predictions, r["label"]))
    lines = read_json_lines(references, "NLVR2's JSON lines {identifier, sentence, label}")
    wanted = by_id(references, lines, "identifier", lambda r: _truth(references, r["label"]))
    match_ids(predictions, found, wanted)
    for identifier in wanted:
        if problem := check_identifier(identifier):
            raise RunError(f"{references}: {problem}")
    scores = np.array([float(found[key] == value) for key, value in wanted.items()])
    groups = [set_of(key) for key in wanted]
    return Scored(nlvr_figures(found, wanted), "accuracy", list(wanted), scores, groups)


def _entailment(predictions: Path, references: Path) -> Scored:
    lines = read_json_lines(predictions, "JSON lines {pairID, label}")
    found = by_id(predictions, lines, "pairID", lambda r: str(r["label"]))
    lines = read_json_lines(references, "JSON lines {pairID, gold_label}")
    rows = by_id(references, lines, "pairID", lambda r: (str(r["gold_label"]), r))
    match_ids(predictions, found, rows)
    wanted = {key: label for key, (label, _) in rows.items()}
    given = {key: found[key] for key in wanted}
    for path, values in ((predictions, given), (references, wanted)):
        if unknown := set(values.values()) - set(ENTAILMENT_LABELS):
            raise RunError(
                f"{path}: label {min(unknown)!r}: wanted one of {', '.join(ENTAILMENT_LABELS)}; correct the file"
            )
    figures = classification_figures(list(given.values()), list(wanted.values()), ENTAILMENT_LABELS)
    scores = np.array([float(given[key] == label) for key, label in wanted.items()])
    images = [str(next((r[n] for n in FLICKR_IDS if r.get(n) not in (None, "")), key)) for key, (_, r) in rows.items()]
    return Scored(figures, "accuracy", list(wanted), scores, images)


def _caption(predictions: Path, references: Path) -> Scored:
    results = read_json(predictions, "a list of {image_id, caption}")
    rows = results if isinstance(results, list) else []
    found = by_id(predictions, rows, "image_id", lambda r: typed(r, "caption", str))
    form = "COCO caption annotations, an object with the list `annotations`"
    document = read_json(references, form)
    wanted: dict[str, list[str]] = {}
    for record in listed(references, document, "annotations", form):
        if isinstance(record, dict) and isinstance(record.get("caption"), str) and "image_id" in record:
            wanted.setdefault(str(record["image_id"]), []).append(record["caption"])
    if not wanted:
        raise RunError(f"{references}: wanted COCO caption annotations, found none; is it a file of another task?")
    match_ids(predictions, found, wanted)
    scores = cider(found, wanted)
    figures = {f"bleu_{n}": 100 * value for n, value in enumerate(bleu(found, wanted), 1)}
    figures["cider_d"] = 100 * float(scores.mean())
    scenes = _scenes(references, listed(references, document, "images", form), wanted)
    return Scored(
        figures | (fact_figures(found, scenes) if scenes else {}), "cider_d", list(wanted), scores, list(wanted)
    )


def _scenes(references: Path, images: list[Any], wanted: dict[str, list[str]]) -> dict[str, Any]:
    """The scenes of the images, if the annotations of composed scenes have them."""
    rows = [row for row in images if isinstance(row, dict) and is_scene(row.get("scene"))]
    scenes = by_id(references, rows, "id", lambda r: r["scene"]) if rows else {}
    if scenes and scenes.keys() != wanted.keys():
        raise RunError(
            f"{references}: wanted a scene for each of {len(wanted)} images with captions, or for none, found "
            f"{len(scenes)}; take all samples of a split"
        )
    return scenes


def _size(record: Mapping[str, Any]) -> list[float]:
    """Width and height of an image."""
    size = numbers(record, "size", 2)
    if min(size) <= 0:
        raise ValueError(f"wanted a size above 0, found {size}")
    return size


def _points(path: Path) -> list[Any]:
    """Points from JSON lines, or from the records of an evaluation's figures."""
    wanted = "JSON lines {id, x, y}, or what `mvlm eval grounding --out` wrote"
    try:
        document = read_json(path, wanted)
    except RunError:  # several lines are no JSON document
        document = None
    if isinstance(document, dict) and "records" in document:
        return listed(path, document, "records", wanted)
    return read_json_lines(path, wanted)


def _grounding(predictions: Path, references: Path) -> Scored:
    points = by_id(
        predictions, _points(predictions), "id", lambda r: (typed(r, "x", int | float), typed(r, "y", int | float))
    )
    rows = by_id(
        references,
        read_json_lines(references, "JSON lines {id, box, size}"),
        "id",
        lambda r: (numbers(r, "box", 4), _size(r), image_name(r) or str(r["id"])),
    )
    match_ids(predictions, points, rows)
    boxes, sizes, groups = zip(*rows.values(), strict=True)
    ordered = [points[key] for key in rows]
    hits = np.array([float(box_contains(box, point)) for box, point in zip(boxes, ordered, strict=True)])
    return Scored(pointing_figures(ordered, boxes, sizes), "accuracy", list(rows), hits, list(groups))


SCORERS: dict[str, Callable[[Path, Path], Scored]] = {
    "vqa": _vqa,
    "pairs": _pairs,
    "entailment": _entailment,
    "caption": _caption,
    "grounding": _grounding,
}


def read_scores(task: str, predictions: Path, references: Path) -> Scored:
    """Scores of predictions. ConfigError for an unknown task, RunError for files that do not fit."""
    if task not in SCORERS:
        raise ConfigError(f"task: wanted one of {', '.join(SCORERS)}, got {task!r}")
    return SCORERS[task](predictions, references)


def score(task: str, predictions: Path, references: Path, other: Path | None = None) -> dict[str, Any]:
    """Figures of a file of predictions, with a 95 % interval of the main one, bootstrapped over images.

    Args:
        other: Predictions of another model on the same references. Adds the paired difference (first minus other) of
            the main figure with its interval, and McNemar's p-value where scores are right or wrong.
    """
    scored = read_scores(task, predictions, references)
    figures: dict[str, Any] = {"task": task, "examples": len(scored.ids), **scored.figures}
    figures[f"{scored.main}_95"] = _interval(scored.scores, scored.groups)
    if other is not None:
        second = read_scores(task, other, references)
        difference = scored.scores - second.scores
        compared: dict[str, Any] = {
            "other": second.figures[second.main],
            "difference": 100 * float(difference.mean()),
            "difference_95": _interval(difference, scored.groups),
        }
        if set(np.concatenate([scored.scores, second.scores]).tolist()) <= {0.0, 1.0}:
            compared["mcnemar_p"] = mcnemar((scored.scores == 1).tolist(), (second.scores == 1).tolist())
        figures["compared"] = compared
    return figures


def _interval(values: np.ndarray, groups: list[str]) -> list[float]:
    return [100 * x for x in grouped_bootstrap(values.tolist(), groups)]
