"""Visual Genome: the region descriptions of an image are the captions of one sample, and each question is a sample."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .files import captions_in_cell, read_as, read_json_list
from .record import Record, Source, check_shares, published, require_folder, source, split_by_hash
from .vqa_v2 import NO_ANSWERS, as_of_ten_people

_FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images")


@source
def visual_genome(root: Path, /, validation: float = 0.0, test: float = 0.0) -> Source:
    """Visual Genome, with the region descriptions of an image as its captions.

    Half of the images are in COCO too: see --against.

        ROOT/region_descriptions.json, and optionally ROOT/image_data.json with ids in COCO and Flickr
        ROOT/VG_100K/*.jpg, ROOT/VG_100K_2/*.jpg

    Args:
        root: Unpacked download with region_descriptions.json, VG_100K and VG_100K_2.
        validation: Share of the images for validation, chosen by a hash of the id. None are published as such.
        test: Share of the images for test, chosen by a hash of the id.
    """
    return _source(
        "visual-genome",
        root,
        "region_descriptions.json",
        _regions,
        (validation, test),
        origin="Visual Genome region descriptions, https://homes.cs.washington.edu/~ranjay/visualgenome",
    )


@source
def visual_genome_qa(root: Path, /, validation: float = 0.0, test: float = 0.0) -> Source:
    """Visual Genome's questions, for the task vqa.

        ROOT/question_answers.json, and optionally ROOT/image_data.json with ids in COCO and Flickr
        ROOT/VG_100K/*.jpg, ROOT/VG_100K_2/*.jpg

    The answer is written in VQA v2's form: in lower case, without the full stop at its end, as ten equal annotators.
    The published answer is in the field `answer`.

    Args:
        root: Unpacked download with question_answers.json, VG_100K and VG_100K_2.
        validation: Share of the images for validation, chosen by a hash of the id.
        test: Share of the images for test, chosen by a hash of the id.
    """
    return _source(
        "visual-genome-qa",
        root,
        "question_answers.json",
        _questions,
        (validation, test),
        origin="Visual Genome question answers, https://homes.cs.washington.edu/~ranjay/visualgenome",
        questions=True,
    )


Row = tuple[int, str, list[str], dict[str, Any], str | None]
"""Record before its image is found: image id, key, captions, metadata, and the fault or None."""


def _source(
    name: str, root: Path, file: str, rows_of: Callable[[dict[str, Any]], Iterator[Row]], shares: tuple[float, float],
    **about: Any,
) -> Source:  # fmt: skip
    """Make a source from an annotation file that is a JSON list of images.

    Args:
        rows_of: yields the rows of one element of the list.
        shares: of the images for validation and for test.
        about: further arguments of `published`.
    """
    validation, test = shares
    check_shares(validation, test)
    find, others = _image_finder(root), _ids_elsewhere(root / "image_data.json")
    records: dict[str, list[Record]] = {}
    with read_as(root / file, f"Visual Genome's {file}"):
        for image in read_json_list(root / file):
            for number, key, captions, metadata, fault in rows_of(image):
                path, facts = find(number), {**metadata, **others.get(number, {})}
                split = split_by_hash(str(number), validation, test)
                records.setdefault(split, []).append(Record(key, path, captions, str(path), facts, fault))
    return published(
        name,
        records,
        [root / file],
        licence="annotations CC BY 4.0; each image under its own Flickr licence",
        attribution="Krishna et al., 2017",
        validation=validation,
        test=test,
        **about,
    )


def _regions(image: dict[str, Any]) -> Iterator[Row]:
    regions = image["regions"]
    # Some releases lack `id`, but every region names its image. int() rejects an id that is a path.
    number = int(image["id"] if "id" in image else regions[0]["image_id"])
    captions = captions_in_cell([region["phrase"] for region in regions])
    yield number, str(number), captions, {"image_id": f"visual-genome {number}"}, None


def _questions(image: dict[str, Any]) -> Iterator[Row]:
    for row in image["qas"]:
        number = int(row.get("image_id", image.get("id", image.get("image_id"))))
        published_answer = row["answer"] if isinstance(row["answer"], str) else ""
        answer = " ".join(published_answer.split()).lower().removesuffix(".").rstrip()
        metadata = {
            "question_id": f"vg {int(row['qa_id'])}",
            "image_id": f"visual-genome {number}",
            "answer": published_answer,
            "answers": as_of_ten_people(answer),
        }
        fault = None if answer else NO_ANSWERS
        yield number, f"vg{int(row['qa_id'])}", captions_in_cell(row["question"]), metadata, fault


def _image_finder(root: Path) -> Callable[[int], Path]:
    """A function that finds the file of an image by its id. DataError if there is no folder of images."""
    folders = [root / name for name in _FOLDERS if (root / name).is_dir()] or [
        require_folder(*(root / name for name in _FOLDERS))
    ]

    @cache
    def find(number: int) -> Path:
        paths = [folder / f"{number}.jpg" for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0])

    return find


def _ids_elsewhere(file: Path) -> dict[int, dict[str, int]]:
    """Read the images' ids in COCO and Flickr. Empty if the file is missing."""
    if not file.is_file():
        return {}
    found = {}
    for image in read_json_list(file):
        number = image.get("image_id", image.get("id")) if isinstance(image, dict) else None
        if number is not None:
            found[number] = {name: image[name] for name in ("coco_id", "flickr_id") if image.get(name) is not None}
    return found
