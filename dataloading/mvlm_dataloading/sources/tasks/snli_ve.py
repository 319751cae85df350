"""SNLI-VE: does an image of Flickr30k entail a sentence, contradict it, or leave it open?

Xie, Lai, Doran and Kadav, "Visual Entailment", 2019. https://github.com/necla-ml/SNLI-VE
"""

from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.files import captions_in_cell, find_file, read_rows, reason_if_outside, wrong_format
from mvlm_dataloading.sources.flickr30k import image_folder
from mvlm_dataloading.sources.record import (
    Record,
    Source,
    cut_into_pieces,
    file_sha256,
    safe_key,
    source,
    with_images_together,
)

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

    Raises:
        DataError: a file or folder is missing, or has another format.
    """
    folder = image_folder(images or root)
    records: dict[str, list[Record]] = {}
    files = []
    for published, split in _SPLITS.items():
        name = f"snli_ve_{published}.jsonl"
        file = find_file(root, name, f"data/{name}")
        if file is not None:
            files.append(file)
            records[split] = with_images_together([_record(folder, row, file) for row in read_rows(file)])
    if not files:
        raise DataError(f"{root / 'snli_ve_train.jsonl'}: wanted a file, found none; give the folder that holds it")
    return Source(
        name="snli-ve",
        origin="SNLI-VE, https://github.com/necla-ml/SNLI-VE",
        licence="sentences CC BY-SA 4.0 (SNLI); images as those of Flickr30k, for research and education",
        attribution="Xie, Lai, Doran and Kadav, 2019; Young, Lai, Hodosh and Hockenmaier, 2014",
        recipe={"annotations": [file_sha256(file) for file in files]},
        pieces=cut_into_pieces(records),
        questions=True,
    )


def _record(folder: Path, row: dict[str, Any], file: Path) -> Record:
    try:
        label, pair, text = row["gold_label"], str(row["pairID"]), captions_in_cell(row["sentence2"])
        image = next(str(row[name]) for name in _IMAGE_FIELDS if name in row).removesuffix(".jpg")
    except (KeyError, StopIteration) as error:
        raise wrong_format(file, "rows with gold_label, pairID, sentence2 and Flickr30K_ID", error) from None
    fault = reason_if_outside(image)
    if label not in LABELS:
        fault = "annotators agree on no label" if label == "-" else f"label is not one of {', '.join(LABELS)}"
    path = folder / f"{image}.jpg"
    metadata = {"pairID": pair, "image_id": f"flickr {image}", "label": label}
    return Record(safe_key(pair), path, text, str(path), metadata, fault)
