"""easy-VQA: 48,248 questions about 5,000 images of simple shapes, from the Python package `easy-vqa` (MIT).

A published data set with its own train and test split and 13 answers (Victor Zhou, 2019). A sample is one question: its
image, the question as its caption, and the answer in the metadata, as ten equal annotators of VQA v2.
"""

import hashlib
import json
import logging
from importlib.resources import files
from pathlib import Path

from mvlm_dataloading.dataset.description import already_written
from mvlm_dataloading.errors import need

from .shard_writer import ShardWriter

log = logging.getLogger(__name__)

NAME = "easy-vqa"
# Increment when questions, images or splits change. Folders of an older revision are then refused, not reused.
_REVISION = 1


def build_easy_vqa(out: Path) -> Path:
    """Write the easy-VQA data set. If `out` already holds it, nothing is written.

    A tenth of the published training images, chosen by a hash, is the validation split, with all their questions. The
    test split is the published one.

    Raises:
        DataError: `out` has other content.
        ImportError: the package `easy-vqa` is missing.
    """
    package = need("easy_vqa", "tasks")
    out = Path(out)
    recipe = {"revision": _REVISION, "easy-vqa": "1.0"}
    if already_written(out, name=NAME, recipe=recipe):
        log.info("%s already holds this data set; left as it is", out)
        return out
    folder = files(package) / "data"
    with ShardWriter(
        out,
        name=NAME,
        source="Python package easy-vqa 1.0 (http://github.com/vzhou842/easy-VQA)",
        licence="MIT",
        attribution="easy-VQA, Victor Zhou",
        recipe=recipe,
    ) as writer:
        for published in ("train", "test"):
            questions = json.loads((folder / published / "questions.json").read_text())
            for number, (question, answer, image) in enumerate(questions):
                split = published
                if published == "train" and int(hashlib.sha1(str(image).encode()).hexdigest(), 16) % 10 == 0:
                    split = "validation"
                metadata = {
                    "question_id": f"{published}-{number}",
                    "image_id": f"easy-vqa {published} {image}",
                    "question_type": " ".join(question.split()[:2]),
                    "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                    "answers": [{"answer": answer, "answer_id": annotator} for annotator in range(1, 11)],
                }
                png = (folder / published / "images" / f"{image}.png").read_bytes()
                writer.add(f"{published}-{number:05d}", png, [question], metadata, split=split)
    return out
