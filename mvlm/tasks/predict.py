"""Predictions for image files, folders and tables, as rows of a file: what `mvlm predict` writes."""

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mvlm.errors import ConfigError, RunError
from mvlm.inference.encode import BATCH
from mvlm.inference.trained_model import TrainedModel
from mvlm_dataloading.files import replaced, write_file, write_json
from mvlm_dataloading.sources.files import files_under, read_rows
from mvlm_dataloading.sources.folder import LISTED, TABLES
from mvlm_dataloading.untrusted import check_links, resolve_inside

log = logging.getLogger(__name__)
FORMATS = (".json", ".jsonl", ".parquet")


class Question(NamedTuple):
    """Input of one prediction: files of its images, one or more, and its text; None for a task without texts."""

    images: tuple[Path, ...]
    text: str | None


def questions_of(
    inputs: Sequence[Path],
    texts: Sequence[str],
    together: int = 1,
    image_column: str = "image",
    text_column: str = "text",
) -> Iterator[Question]:
    """Yield the inputs of predictions: images that files, folders and tables name, with their text or each of `texts`.

    Args:
        inputs: image files, folders of images, or tables whose rows have an image, relative to the table, and a text.
        texts: texts for every image; empty for a task that reads images alone, and with tables that have a text.
        together: images of a sample. Files are then taken so many at a time, and cells of a table are lists.

    Raises:
        RunError: a file or folder is missing or holds no images.
        DataError: a table cannot be read.
        ConfigError: a row does not name its images.
    """
    images: list[Path] = []
    for path in inputs:
        if path.suffix.lower() in TABLES:
            for number, row in enumerate(read_rows(path), 1):
                cell, text = row.get(image_column), row.get(text_column)
                names: list[Any] = cell if isinstance(cell, list) else [cell]
                if len(names) != together or not all(isinstance(name, str) and name for name in names):
                    raise ConfigError(
                        f"{path} row {number}: wanted {together} images in the column {image_column}, got {cell!r}; "
                        f"name the column with --image-column"
                    )
                files = tuple(path.parent / name for name in names)
                for file in files:
                    resolve_inside(file, path.parent)
                for line in [str(text)] if text is not None else texts or (None,):
                    yield Question(files, line)
        elif path.is_dir():
            check_links(path)
            found = [file for file in files_under(path) if file.suffix.lower() in LISTED]
            if not found:
                raise RunError(f"{path}: wanted a folder of images, found no image in it; check the path")
            images += found
        elif path.is_file():
            images.append(path)
        else:
            raise RunError(f"{path}: wanted an image, a folder of images or a table, found nothing; check the path")
    if len(images) % together:
        raise RunError(f"images: wanted {together} for each text, got {len(images)} in all")
    for first in range(0, len(images), together):
        for line in texts or (None,):
            yield Question(tuple(images[first : first + together]), line)


def predicted(model: TrainedModel, questions: Iterator[Question]) -> Iterator[dict[str, Any]]:
    """Yield a row {"image", "text", **prediction} for each question, in order.

    A question whose image cannot be read gets {"image", "text", "error"} in its place.
    """
    while chunk := list(islice(questions, BATCH)):
        try:
            yield from _rows(model, chunk)
        except RunError:
            for question in chunk:
                try:
                    yield from _rows(model, [question])
                except RunError as error:
                    log.warning("%s", error)
                    yield _named(question) | {"error": str(error)}


def _rows(model: TrainedModel, chunk: Sequence[Question]) -> list[dict[str, Any]]:
    images: Any = [question.images if len(question.images) > 1 else next(iter(question.images)) for question in chunk]
    texts = None if chunk[0].text is None else [q.text or "" for q in chunk]
    found = model.predict(images, texts)
    return [_named(question) | prediction for question, prediction in zip(chunk, found, strict=True)]


def _named(question: Question) -> dict[str, Any]:
    names: Any = [str(image) for image in question.images]
    named: dict[str, Any] = {"image": names if len(names) > 1 else names[0]}
    return named if question.text is None else named | {"text": question.text}


def write_rows(rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows to a file: Parquet if its name ends in .parquet, a JSON list if in .json, else JSON lines."""
    if out.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        with replaced(out) as aside:
            pyarrow.parquet.write_table(pyarrow.table(columns), aside)
    elif out.suffix == ".json":
        write_json(out, rows)
    else:
        write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
