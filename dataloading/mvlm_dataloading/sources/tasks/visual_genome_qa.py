"""Visual Genome QA: one answer to each question. Published without splits."""

from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.files import captions_in_cell, read_json_list, wrong_format
from mvlm_dataloading.sources.record import (
    Record,
    Source,
    check_shares,
    cut_into_pieces,
    file_sha256,
    source,
    split_by_hash,
    with_images_together,
)
from mvlm_dataloading.sources.visual_genome import ids_elsewhere, image_finder

from .vqa_v2 import NO_ANSWERS

ANNOTATORS = 10


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

    Raises:
        DataError: a file or folder is missing, or has another format.
    """
    check_shares(validation, test)
    file, find = root / "question_answers.json", image_finder(root)
    others = ids_elsewhere(root / "image_data.json")
    records: dict[str, list[Record]] = {}
    try:
        for image in read_json_list(file):
            for row in image["qas"]:
                number = int(row.get("image_id", image.get("id", image.get("image_id"))))
                split = split_by_hash(str(number), validation, test)
                records.setdefault(split, []).append(_record(row, number, find(number), others.get(number, {})))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise wrong_format(file, "Visual Genome's question_answers.json", error) from None
    return Source(
        name="visual-genome-qa",
        origin="Visual Genome question answers, https://homes.cs.washington.edu/~ranjay/visualgenome",
        licence="annotations CC BY 4.0; each image under its own Flickr licence",
        attribution="Krishna et al., 2017",
        recipe={"annotations": [file_sha256(file)], "validation": validation, "test": test},
        pieces=cut_into_pieces({split: with_images_together(listed) for split, listed in records.items()}),
        questions=True,
    )


def _record(row: dict[str, Any], image: int, path: Path, others: dict[str, int]) -> Record:
    published = row["answer"] if isinstance(row["answer"], str) else ""
    answer = " ".join(published.split()).lower().removesuffix(".").rstrip()
    metadata = {
        "question_id": f"vg {int(row['qa_id'])}",
        "image_id": f"visual-genome {image}",
        "answer": published,
        "answers": [{"answer": answer, "answer_id": annotator} for annotator in range(1, ANNOTATORS + 1)],
        **others,
    }
    key, question = f"vg{int(row['qa_id'])}", captions_in_cell(row["question"])
    return Record(key, path, question, str(path), metadata, None if answer else NO_ANSWERS)
