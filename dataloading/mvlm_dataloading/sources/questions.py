"""A table of questions about a folder of images."""

from pathlib import Path
from typing import Any

from .files import captions_in_cell, reason_if_outside
from .folder import split_of_image, table_rows
from .record import Record, Source, check_shares, published, require_folder, source
from .vqa_v2 import NO_ANSWERS, as_of_ten_people


@source
def questions(
    images: Path,
    table: Path,
    /,
    *,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    split_column: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "questions",
) -> Source:
    """A table of questions about a folder of images, for the task vqa: each row has an image, a question, its answer.

    A question's split is that of the table. Without one, it is that of its image in `mvlm data folder`: all questions
    about an image have one split.

    Args:
        images: Folder of images, subfolders included.
        table: Table of questions: .csv, .tsv or .jsonl.
        image_column: Column of file names, relative to the folder.
        question_column: Column of questions.
        answer_column: Column of answers.
        split_column: Column of splits. Default: split, or Split, if it is there.
        validation: Share of the other images for validation, chosen by a hash of the name. 1.0 takes all.
        test: Share of the other images for test, chosen by a hash of the name. 1.0 takes all.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.

    Raises:
        DataError: the table lacks a column, or a split has an unknown name.
    """
    check_shares(validation, test)
    require_folder(images)
    columns = {"image": image_column, "question": question_column, "answer": answer_column}
    records: dict[str, list[Record]] = {}
    for number, (file, row, split) in enumerate(table_rows(images, table, columns, split_column), 1):
        answer = _answer(row.get(answer_column))
        facts = {"file": file, "question_id": str(number), "image_id": file, "answers": as_of_ten_people(answer)}
        fault = reason_if_outside(file) or (None if answer else NO_ANSWERS)
        asked = captions_in_cell(row.get(question_column))
        record = Record(str(number), images / file, asked, f"{file}, row {number}", facts, fault)
        records.setdefault(split or split_of_image(images, file, validation, test), []).append(record)
    return published(
        name,
        records,
        [table],
        origin=str(images.name),
        licence=licence,
        attribution="",
        questions=True,
        validation=validation,
        test=test,
        columns=[*columns.values(), split_column or "split"],
    )


def _answer(cell: Any) -> str:
    """The answer in a cell: a text, or a number of a .jsonl; "" for none."""
    return " ".join(str(cell).split()) if isinstance(cell, str | int | float) else ""
