"""VQA v2: questions about COCO's images, with the answers of ten people each.

Goyal et al., "Making the V in VQA Matter", CVPR 2017. https://visualqa.org
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .files import captions_in_cell, coco_folder, find_file, read_as, read_json
from .record import Record, Source, published, require_one_of, source

_SPLITS = {"train2014": "train", "val2014": "validation", "test2015": "test"}
_FOLDERS = ("", "questions", "Questions", "annotations", "Annotations")
NO_ANSWERS = "question has no answers"


def as_of_ten_people(answer: str) -> list[dict[str, Any]]:
    """One answer in VQA v2's form, as if ten people had given it.

    VQA's metric takes an answer as right if at least three people gave it.
    """
    return [{"answer": answer, "answer_id": person} for person in range(1, 11)]


@source
def vqa_v2(root: Path, /, images: Path | None = None, held_out: int = 0, minival: Path | None = None) -> Source:
    """VQA v2, for the task vqa: train2014, val2014 and, without answers, test2015.

        ROOT/v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json
        ROOT/v2_mscoco_{train2014,val2014}_annotations.json
        IMAGES/{train2014,val2014,test2015}/COCO_*.jpg

    A split whose questions are missing is left out. By default train2014 is train and val2014 validation. With
    `held_out` or `minival`, part of val2014 is validation and the rest joins train, as papers do before they test.

    Args:
        root: Unpacked download with v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json.
        images: Parent of COCO's train2014, val2014 and test2015. Default: ROOT.
        held_out: Validate on the questions of this many images of val2014, chosen by a hash of the id, and train on
            the others too.
        minival: Validate on the questions that this file chooses from val2014, and train on the others too: a list of
            questions (LXMERT's minival.json) or of their ids, or Karpathy's dataset_coco.json (the images of its val).
    """
    if held_out < 0 or (held_out and minival):
        raise DataError(f"held-out: wanted 0 or more images, or --minival instead, got {held_out} and {minival}")
    chosen = None if minival is None else _chosen(minival)
    records: dict[str, list[Record]] = {}
    used = [] if minival is None else [minival]
    for part, split in _SPLITS.items():
        questions = _find(root, f"v2_OpenEnded_mscoco_{part}_questions.json")
        if questions is None:
            continue
        files = [questions]
        if split != "test":
            files.append(_need(root, f"v2_mscoco_{part}_annotations.json"))
        elif dev := _find(root, "v2_OpenEnded_mscoco_test-dev2015_questions.json"):
            files.append(dev)
        used += files
        listed = _records(coco_folder([images or root, root], part), part, *files)
        if part == "val2014" and (held_out or chosen is not None):
            validation = chosen if chosen is not None else _smallest(listed, held_out)
            for record in listed:
                inside = record.metadata["question_id"] in validation or record.metadata["image_id"] in validation
                records.setdefault("validation" if inside else "train", []).append(record)
            if not records.get("validation"):
                raise DataError(f"{minival}: wanted questions or images of val2014, found none; give another file")
        else:
            records.setdefault(split, []).extend(listed)
    if (held_out or chosen is not None) and "validation" not in records:
        _need(root, "v2_OpenEnded_mscoco_val2014_questions.json")
    if not records:
        _need(root, "v2_OpenEnded_mscoco_train2014_questions.json")
    return published(
        "vqa-v2",
        records,
        used,
        origin="VQA v2, https://visualqa.org",
        licence="questions and answers CC BY 4.0; each image under its own Flickr licence",
        attribution="Goyal, Khot, Summers-Stay, Batra and Parikh, 2017; COCO Consortium",
        questions=True,
        held_out=held_out,
    )


def _find(root: Path, name: str) -> Path | None:
    return find_file(root, *(str(Path(folder, name)) for folder in _FOLDERS))


def _need(root: Path, name: str) -> Path:
    return require_one_of(*(root / folder / name for folder in _FOLDERS))


def _records(folder: Path, part: str, questions: Path, other: Path | None = None) -> list[Record]:
    """A record for each question of a part, and for each annotation without a question.

    other: file of the annotations; for the part test2015, which has none, the file of test-dev's questions.
    """
    test = part == "test2015"
    paths: dict[int, Path] = {}
    known: dict[tuple[str, Any], dict[str, Any]] = {}  # equal answers are one object: a third of the memory
    asked: set[Any] = set()
    found = []
    with read_as(questions, "VQA v2's questions and annotations"):
        dev = {row["question_id"] for row in _rows(other, "questions")} if test and other else set()
        annotations, surplus = ({}, []) if test or other is None else _by_question(_rows(other, "annotations"))
        for row in _rows(questions, "questions"):
            number, image = row["question_id"], int(row["image_id"])
            path = paths.setdefault(image, folder / f"COCO_{part}_{image:012d}.jpg")
            metadata = {"question_id": number, "image_id": f"coco {image}"}
            fault = None
            if test:
                metadata |= {"test_dev": True} if number in dev else {}
            else:
                asked.add(number)
                metadata |= _answers(annotations.get(number, {}), known)
                fault = None if metadata["answers"] else NO_ANSWERS
            found.append(Record(str(int(number)), path, captions_in_cell(row["question"]), str(path), metadata, fault))
        orphans = [(number, "annotation has no question") for number in annotations if number not in asked]
        for number, fault in [*orphans, *((number, "question has two annotations") for number in surplus)]:
            metadata = {"question_id": number, "image_id": ""}
            found.append(Record(str(int(number)), None, (), str(other), metadata, fault))
    return found


def _by_question(rows: list[dict[str, Any]]) -> tuple[dict[Any, dict[str, Any]], list[Any]]:
    """First annotation of each question, keyed by question id, and the question ids of further annotations."""
    annotations: dict[Any, dict[str, Any]] = {}
    surplus = [row["question_id"] for row in rows if annotations.setdefault(row["question_id"], row) is not row]
    return annotations, surplus


def _answers(annotation: dict[str, Any], known: dict[tuple[str, Any], dict[str, Any]]) -> dict[str, Any]:
    answers = [
        known.setdefault((one["answer"], one["answer_id"]), {"answer": one["answer"], "answer_id": one["answer_id"]})
        for one in annotation.get("answers") or ()
    ]
    kinds = {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
    return {**kinds, "answers": answers}


def _rows(file: Path, name: str) -> list[dict[str, Any]]:
    content = read_json(file)
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "question_id" in row for row in rows):
        raise DataError(f"{file}: wanted VQA v2's {name}, found another format; download it again")
    return rows


def _smallest(records: Iterable[Record], count: int) -> set[str]:
    """Ids of the `count` images whose ids have the smallest hashes.

    The choice does not depend on the number of questions.
    """
    images = {record.metadata["image_id"] for record in records} - {""}  # annotations without a question have none
    return set(sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def _chosen(file: Path) -> set[Any]:
    """Ids of questions, or `image_id`s, that the file of `--minival` chooses for validation."""
    with read_as(file, "a list of questions, or Karpathy's dataset_coco.json"):
        content = read_json(file)
        if isinstance(content, dict):
            return {f"coco {int(image['cocoid'])}" for image in content["images"] if image["split"] == "val"}
        return {int(row["question_id"] if isinstance(row, dict) else row) for row in content}
