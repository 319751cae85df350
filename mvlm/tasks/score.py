"""Files of predictions and references in the formats of the published benchmarks: written, read and scored.

Predictions of any model can be scored (docs/guides/tasks.md), without a model and without torch. Every reader checks
that ids are unique. `match_ids` checks that predictions answer exactly the references: nothing is scored on what
happens to be there.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mvlm.errors import ConfigError, RunError
from mvlm.statistics import mcnemar
from mvlm.tasks.metrics import Scored, percent_interval
from mvlm.tasks.metrics.captions import is_scene, score_captions
from mvlm.tasks.metrics.labels import check_identifier, score_labels, score_statements, set_of
from mvlm.tasks.metrics.vqa import answer_fault, score_answers, warn_of_few_answers
from mvlm_dataloading import untrusted
from mvlm_dataloading.dataset.dataset import first_samples, image_name
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import write_file

Value = TypeVar("Value")
ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
FLICKR_IDS = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")
"""Field of a SNLI-VE record that names its Flickr30k image; releases spell it in these three ways."""


@contextmanager
def _reading(path: Path, wanted: str) -> Iterator[None]:
    """Context in which a file is read: its OSError and DataError become a RunError of one line.

    wanted: the expected content in words, for the message.
    """
    try:
        yield
    except DataError as error:
        raise RunError(str(error)) from None
    except OSError as error:
        raise RunError(f"{path}: wanted {wanted}, could not read it: {error.strerror}; check the path") from None


def read_json(path: Path, wanted: str) -> Any:
    """The value of a JSON file. RunError, which says what was `wanted`, if it cannot be read."""
    with _reading(path, wanted):
        return untrusted.read_json(path, "predictions", wanted)


def read_json_lines(path: Path, wanted: str) -> list[dict[str, Any]]:
    """The records of a file with a JSON object on each line. RunError names the first line that is none."""
    records = []
    with _reading(path, wanted):
        for number, line in enumerate(untrusted.regular_lines(path, "predictions"), 1):
            if not line.strip():
                continue
            try:
                record = untrusted.parse_json(line)
            except ValueError as error:
                raise RunError(f"{path}, line {number}: wanted a JSON object, found {error}") from None
            if not isinstance(record, dict):
                raise RunError(f"{path}, line {number}: wanted a JSON object, found {type(record).__name__}")
            records.append(record)
    return records


def read_csv(path: Path, fields: int, wanted: str) -> list[list[str]]:
    """The rows of a CSV file without a header. RunError for a row that does not have `fields` fields."""
    with _reading(path, wanted):
        content = untrusted.read_regular(path, "predictions")
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode(), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: wanted {wanted}, could not read it: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != fields:
            raise RunError(f"{path}, row {number}: wanted {fields} fields, found {len(row)}; it should be {wanted}")
    return rows


def by_id(
    path: Path, records: Iterable[Mapping[str, Any]], name: str, value: Callable[[Mapping[str, Any]], Value]
) -> dict[str, Value]:
    """Dict from each record's id, its field `name` as text, to `value(record)`.

    RunError, which names the file `path`, if a record lacks a field, an id occurs twice, or there is no record.
    """
    values: dict[str, Value] = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise RunError(f"{path}, record {number}: wanted an object, found {type(record).__name__}")
        try:
            key, content = str(record[name]), value(record)
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{path}, record {number}: wanted the field {error}; is it a file of another task?"
            ) from None
        except ValueError as error:
            raise RunError(f"{path}, record {number}: {error}") from None
        if key in values:
            raise RunError(f"{path}: {name} {key} occurs twice; each may occur once")
        values[key] = content
    if not values:
        raise RunError(f"{path}: wanted records with the field {name!r}, found none")
    return values


def typed(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """The field `name` of a record. ValueError if it is not of the type `kind`."""
    if not isinstance(record[name], kind):
        raise ValueError(f"wanted {name} as {kind.__name__}, found {record[name]!r}")
    return record[name]


def filled(record: Mapping[str, Any], name: str) -> Any:
    """The field `name` of a record, a list with entries. ValueError if it is none."""
    if not typed(record, name, list):
        raise ValueError(f"wanted entries in {name}, found an empty list")
    return record[name]


def listed(path: Path, document: Any, name: str, wanted: str) -> list[Any]:
    """The list under the key `name` of a JSON object; empty if there is no such key or the document is no object.

    RunError, with `wanted` as the expected content and `path` as the place, if the value is no list.
    """
    found = document.get(name) if isinstance(document, dict) else None
    if not isinstance(found, list | None):
        raise RunError(f"{path}: wanted {wanted}, found {type(found).__name__} in {name}")
    return found or []


def match_ids(path: Path, predictions: Mapping[str, Any], references: Mapping[str, Any]) -> None:
    """Raise RunError unless the predictions have exactly the references' ids. `path` is the predictions' file."""
    missing, unknown = references.keys() - predictions.keys(), predictions.keys() - references.keys()
    if missing or unknown:
        which = "no prediction for" if missing else "a prediction for the unknown id"
        raise RunError(
            f"{path}: wanted {len(references)} predictions, one for each reference, found {which} "
            f"{min(missing or unknown)} ({len(missing)} missing, {len(unknown)} unknown)"
        )


def _vqa(predictions: Path, references: Path) -> Scored:
    rows = _list(read_json(predictions, "a list of {question_id, answer}"))
    answers = by_id(predictions, rows, "question_id", lambda r: typed(r, "answer", str))
    wanted = "VQA annotations, an object with the list `annotations`"
    rows = listed(references, read_json(references, wanted), "annotations", wanted)
    annotations = by_id(references, rows, "question_id", lambda r: {**r, "answers": _answers(r)})
    match_ids(predictions, answers, annotations)
    records = [{**record, "question_id": key} for key, record in annotations.items()]
    warn_of_few_answers(records)
    return score_answers(answers, records)


def _list(document: Any) -> list[Any]:
    """The document if it is a list; else an empty list, which `by_id` reports as missing records."""
    return document if isinstance(document, list) else []


def _answers(record: Mapping[str, Any]) -> list[Any]:
    """Annotators' answers of a VQA question. ValueError if one is no object with a text, or two are equal."""
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
    return score_statements(found, wanted, [set_of(key) for key in wanted])


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
    images = [str(next((r[n] for n in FLICKR_IDS if r.get(n) not in (None, "")), key)) for key, (_, r) in rows.items()]
    return score_labels(list(given.values()), list(wanted.values()), ENTAILMENT_LABELS, images)


def _caption(predictions: Path, references: Path) -> Scored:
    rows = _list(read_json(predictions, "a list of {image_id, caption}"))
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
    return score_captions(found, wanted, _scenes(references, listed(references, document, "images", form), wanted))


def _scenes(references: Path, images: list[Any], wanted: dict[str, list[str]]) -> dict[str, Any]:
    """Scene {size, objects} of each image id; empty unless the annotations are of composed images.

    RunError if some images with captions have a scene and others have none.

    Args:
        references: file of the annotations, for the message.
        images: rows `images` of the annotations.
        wanted: reference captions of each image id.
    """
    rows = [row for row in images if isinstance(row, dict) and is_scene(row.get("scene"))]
    scenes = by_id(references, rows, "id", lambda r: r["scene"]) if rows else {}
    if scenes and scenes.keys() != wanted.keys():
        raise RunError(
            f"{references}: wanted a scene for each of {len(wanted)} images with captions, or for none, found "
            f"{len(scenes)}; take all samples of a split"
        )
    return scenes


SCORERS: dict[str, Callable[[Path, Path], Scored]] = {
    "vqa": _vqa,
    "pairs": _pairs,
    "entailment": _entailment,
    "caption": _caption,
}


def score(task: str, predictions: Path, references: Path, other: Path | None = None) -> dict[str, Any]:
    """Figures of a file of predictions, with a 95 % interval of the main one, bootstrapped over images.

    Args:
        other: Predictions of another model on the same references. Adds the paired difference (first minus other) of
            the main figure with its interval, and McNemar's p-value where scores are right or wrong.

    ConfigError for an unknown task, RunError for files that do not fit.
    """
    if task not in SCORERS:
        raise ConfigError(f"task: wanted one of {', '.join(SCORERS)}, got {task!r}")
    scored = SCORERS[task](predictions, references)
    figures: dict[str, Any] = {"task": task, "examples": len(scored.scores), **scored.all_figures}
    if other is not None:
        second = SCORERS[task](other, references)
        difference = scored.scores - second.scores
        compared: dict[str, Any] = {
            "other": second.figures[second.main],
            "difference": 100 * float(difference.mean()),
            "difference_95": percent_interval(difference, scored.groups),
        }
        if set(np.concatenate([scored.scores, second.scores]).tolist()) <= {0.0, 1.0}:
            compared["mcnemar_p"] = mcnemar((scored.scores == 1).tolist(), (second.scores == 1).tolist())
        figures["compared"] = compared
    return figures


WRITTEN = ("vqa", "entailment", "pairs", "caption")
"""Tasks whose predictions are written in the format of a benchmark. Those of others are JSON lines {id, ...}."""
FIELDS = {"vqa": {"question_id", "answer"}, "entailment": {"pairID", "label"}, "caption": {"image_id", "caption"}}
"""Fields of a prediction in the files of tasks that write predictions as JSON objects."""


def are_predictions(task: str, content: bytes) -> bool:
    """True if a file's bytes are predictions of a task in the format of `write_predictions`."""
    try:
        text = content.decode()
        if task == "pairs":
            return all(line.endswith((",True", ",False")) for line in text.splitlines())
        in_lines = task == "entailment" or task not in WRITTEN
        rows = [json.loads(line) for line in text.splitlines()] if in_lines else json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    return all(row.keys() == FIELDS[task] if task in WRITTEN else "id" in row for row in rows)


def write_predictions(
    path: Path, task: str, records: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]]
) -> None:
    """Write predictions of a split in the format of the task's benchmark, which its server and `mvlm score` read.

    - vqa: a JSON list of {question_id, answer}.
    - entailment: JSON lines {pairID, label}. A sample without `pairID` goes by its number.
    - pairs: CSV rows `identifier,True` or `identifier,False`.
    - caption: a JSON list of {image_id, caption}. COCO's images have a number again. A sample without `image_id` goes
      by its own number. Of samples with the same one, the first is written.
    - a task without a benchmark: JSON lines {id, ...} with all fields of the prediction. A sample without `id` goes by
      its number.

    Args:
        records: {"sample", "answer" | "label" | "caption"} of each sample, in order.
        samples: metadata of the same samples.
    """
    both = list(zip(records, samples, strict=True))
    if task == "vqa":
        text = json.dumps([{"question_id": s["question_id"], "answer": r["answer"]} for r, s in both])
    elif task == "entailment":
        text = "".join(
            json.dumps({"pairID": s.get("pairID", str(r["sample"])), "label": r["label"]}) + "\n" for r, s in both
        )
    elif task == "pairs":
        text = "".join(f"{s['identifier']},{str(r['label']).capitalize()}\n" for r, s in both)
    elif task == "caption":
        both = [both[i] for i in dict.fromkeys(first_samples(s for _, s in both))]
        text = json.dumps([{"image_id": _published_id(s, r["sample"]), "caption": r["caption"]} for r, s in both])
    else:
        rows = ({"id": s.get("id", r["sample"])} | {n: x for n, x in r.items() if n != "sample"} for r, s in both)
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)


def _published_id(sample: Mapping[str, Any], number: int) -> Any:
    """Id of a sample's image in its benchmark: `image_id`, its number alone for COCO ("coco 42" becomes 42).

    number: the sample's number, which is the id of an image without `image_id`.
    """
    if (name := image_name(sample)) is None:
        return number
    coco = name.removeprefix("coco ")
    return int(coco) if coco != name and coco.isdigit() else sample["image_id"]
