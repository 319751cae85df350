"""Files of predictions and references in the formats of the published benchmarks: read and checked, and written.

Every reader checks that ids are unique. `match_ids` checks that predictions answer exactly the references: nothing is
scored on what happens to be there.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mvlm.errors import RunError
from mvlm_dataloading.dataset.dataset import first_samples, image_name
from mvlm_dataloading.files import write_file

Value = TypeVar("Value")


def read_json(path: Path, wanted: str) -> Any:
    """The value of a JSON file. RunError, which says what was `wanted`, if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: wanted {wanted}, could not read it: {error}") from None


def read_json_lines(path: Path, wanted: str) -> list[dict[str, Any]]:
    """The records of a file with a JSON object on each line. RunError names the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON allows U+2028 and the like within a string
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: wanted {wanted}, could not read it: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: wanted a JSON object, found {error}") from None
        if not isinstance(record, dict):
            raise RunError(f"{path}, line {number}: wanted a JSON object, found {type(record).__name__}")
        records.append(record)
    return records


def read_csv(path: Path, fields: int, wanted: str) -> list[list[str]]:
    """The rows of a CSV file without a header. RunError for a row that does not have `fields` fields."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: wanted {wanted}, could not read it: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != fields:
            raise RunError(f"{path}, row {number}: wanted {fields} fields, found {len(row)}; it should be {wanted}")
    return rows


def by_id(
    path: Path, records: Iterable[Mapping[str, Any]], name: str, value: Callable[[Mapping[str, Any]], Value]
) -> dict[str, Value]:
    """`value` of each record by the string of its field `name`.

    RunError if a record lacks a field, an id occurs twice, or there is no record.
    """
    found: dict[str, Value] = {}
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
        if key in found:
            raise RunError(f"{path}: {name} {key} occurs twice; each may occur once")
        found[key] = content
    if not found:
        raise RunError(f"{path}: wanted records with the field {name!r}, found none")
    return found


def typed(record: Mapping[str, Any], name: str, kind: Any) -> Any:
    """The field `name` of a record. ValueError if it is not of the type, or one of the types, `kind`."""
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"wanted {name} as {wanted}, found {record[name]!r}")
    return record[name]


def filled(record: Mapping[str, Any], name: str) -> Any:
    """The field `name` of a record, a list with entries. ValueError if it is none."""
    if not typed(record, name, list):
        raise ValueError(f"wanted entries in {name}, found an empty list")
    return record[name]


def numbers(record: Mapping[str, Any], name: str, count: int) -> list[float]:
    """The field `name` of a record, a list of `count` numbers. ValueError if it is none."""
    found = filled(record, name)
    if len(found) != count or not all(isinstance(x, int | float) and abs(x) <= sys.float_info.max for x in found):
        raise ValueError(f"wanted {name} as {count} numbers, found {found!r}")
    return found


def listed(path: Path, document: Any, name: str, wanted: str) -> list[Any]:
    """The list `name` of a JSON object, empty without one. RunError, which says what was `wanted`, for no list."""
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


WRITTEN = ("vqa", "entailment", "pairs", "caption")
"""Tasks whose predictions are written in the format of a benchmark. Those of others are JSON lines {id, ...}."""
FIELDS = {"vqa": {"question_id", "answer"}, "entailment": {"pairID", "label"}, "caption": {"image_id", "caption"}}
"""Fields of a prediction that is a JSON object."""


def are_predictions(task: str, content: bytes) -> bool:
    """True for the content of a file of predictions of a task, as `write_predictions` writes it."""
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
    """The id of a sample's image in its benchmark. That of COCO's images is "coco NUMBER" in our data sets."""
    if (name := image_name(sample)) is None:
        return number
    coco = name.removeprefix("coco ")
    return int(coco) if coco != name and coco.isdigit() else sample["image_id"]
