"""SNLI-VE: does an image of Flickr30k entail a sentence, contradict it, or leave it open?

Xie, Lai, Doran and Kadav, "Visual Entailment", 2019. https://github.com/necla-ml/SNLI-VE
"""

from pathlib import Path
from typing import Any

from .files import captions_in_cell, read_as, read_rows, reason_if_outside, split_files
from .flickr30k import image_folder
from .record import Record, Source, published, safe_key, source

_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
LABELS = ("contradiction", "neutral", "entailment")
_IMAGE_FIELDS = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")
"""Names of the image's field in the releases."""


@source
def snli_ve(root: Path, /, images: Path | None = None) -> Source:
    """SNLI-VE, for the task entailment: an image of Flickr30k and a hypothesis about it.

        ROOT/snli_ve_{train,dev,test}.jsonl, or in ROOT/data
        IMAGES/*.jpg, or in IMAGES/flickr30k-images

    The text of a sample is the hypothesis, `sentence2`. The premise `sentence1` describes the image, so it is left out.

    Args:
        root: Folder with snli_ve_train.jsonl, snli_ve_dev.jsonl and snli_ve_test.jsonl.
        images: Folder of Flickr30k's images. Default: ROOT/flickr30k-images.
    """
    folder = image_folder(images or root)
    files = split_files(root, _SPLITS, "snli_ve_{0}.jsonl", "data/snli_ve_{0}.jsonl")
    return published(
        "snli-ve",
        {split: [_record(folder, row, file) for row in read_rows(file)] for _, split, file in files},
        [file for *_, file in files],
        origin="SNLI-VE, https://github.com/necla-ml/SNLI-VE",
        licence="sentences CC BY-SA 4.0 (SNLI); images as those of Flickr30k, for research and education",
        attribution="Xie, Lai, Doran and Kadav, 2019; Young, Lai, Hodosh and Hockenmaier, 2014",
        questions=True,
    )


def _record(folder: Path, row: dict[str, Any], file: Path) -> Record:
    with read_as(file, "rows with gold_label, pairID, sentence2 and Flickr30K_ID"):
        label, pair, text = row["gold_label"], str(row["pairID"]), captions_in_cell(row["sentence2"])
        name = next((name for name in _IMAGE_FIELDS if name in row), _IMAGE_FIELDS[0])
        image = str(row[name]).removesuffix(".jpg")
    fault = reason_if_outside(image)
    if label not in LABELS:
        fault = "annotators agree on no label" if label == "-" else f"label is not one of {', '.join(LABELS)}"
    path = folder / f"{image}.jpg"
    metadata = {"pairID": pair, "image_id": f"flickr {image}", "label": label}
    return Record(safe_key(pair), path, text, str(path), metadata, fault)
