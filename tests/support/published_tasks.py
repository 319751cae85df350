"""Small data sets of downstream tasks, written as published, with the odd rows that the real ones have."""

import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from .published import add_members, encoded, make_image, write_image, write_json

QUESTIONS = ("What colour is it?", "Is it soft?", "¿Cuántos?")


def vqa_v2(root: Path, train: int = 4, val: int = 4, test: int = 2) -> None:
    """Three questions about each image, the third in Spanish with an annotator's empty answer; test without answers."""
    for published, first, count in (("train2014", 0, train), ("val2014", train, val), ("test2015", train + val, test)):
        questions, annotations = [], []
        for i in range(first, first + count):
            image = 100 + i
            write_image(root / published / f"COCO_{published}_{image:012d}.jpg", i)
            for k, question in enumerate(QUESTIONS):
                number = 1000 * image + k
                questions.append({"image_id": image, "question": question, "question_id": number})
                answers = [f"colour {i % 2}", "yes" if i % 2 else "no", str(i % 3)]
                annotations.append(_annotation(image, number, k, answers[k]))
        questions.sort(key=lambda row: row["question_id"] % 1000)  # those about an image are far apart
        head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": published}
        write_json(root / f"v2_OpenEnded_mscoco_{published}_questions.json", {**head, "questions": questions})
        if published != "test2015":
            write_json(root / f"v2_mscoco_{published}_annotations.json", {**head, "annotations": annotations})
        else:
            dev = {**head, "data_subtype": "test-dev2015", "questions": questions[: len(QUESTIONS)]}
            write_json(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", dev)


def _annotation(image: int, number: int, k: int, answer: str) -> dict[str, Any]:
    given = [answer] * 9 + ["" if k == 2 else "ünsure"]
    return {
        "question_type": ("what color", "is it", "how many")[k],
        "multiple_choice_answer": answer,
        "answers": [
            {"answer": one, "answer_confidence": "yes", "answer_id": annotator}
            for annotator, one in enumerate(given, 1)
        ],
        "image_id": image,
        "answer_type": ("other", "yes/no", "number")[k],
        "question_id": number,
    }


def visual_genome_qa(root: Path, count: int = 4) -> None:
    """Two questions about each image; the last answer of all is empty."""
    content = []
    for i in range(count):
        number = 2407000 + i
        write_image(root / ("VG_100K" if i % 2 else "VG_100K_2") / f"{number}.jpg", i)
        answers = ["Dark Blue.", "" if i == count - 1 else "On the table."]
        rows = [{"a_objects": [], "q_objects": [], "question": f"Question {k}?", "image_id": number,
                 "qa_id": 986000 + 2 * i + k, "answer": answer} for k, answer in enumerate(answers)]  # fmt: skip
        content.append({"id": number, "qas": rows})
    write_json(root / "question_answers.json", content)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def nlvr2(root: Path, pairs: int = 3) -> None:
    """Two sentences about each pair. Images are JPEG or PNG whatever their name, of any shape."""
    for split in ("train", "dev", "test1"):
        rows = []
        for i in range(pairs):
            inside = f"train/{i}" if split == "train" else split
            for k in (0, 1):
                path = root / "images" / inside / f"{split}-7-{i}-img{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(make_image(10 * i + k, (60 + 20 * i, 50)), ("JPEG", "PNG")[k]))
            for s in (0, 1):
                row = {"sentence": f"There are {s} dogs — in pair {i}.", "label": ("True", "False")[(i + s) % 2],
                       "identifier": f"{split}-7-{i}-{s}", "left_url": "https://example.org/a", "writer": 3,
                       "right_url": "https://example.org/b", "validation": [], "query": "dogs1"}  # fmt: skip
                rows.append({**row, "directory": i} if split == "train" else row)
        write_lines(root / "data" / f"{split}.json", rows)


def nlvr(root: Path, count: int = 2) -> None:
    """Grey images with three light boxes; box b of order k has the colour (b + k) mod 3. Two images a sentence."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for split in ("train", "dev", "test"):
        rows = []
        for n in range(count):
            for m in (0, 2):
                for k in range(6):
                    image = Image.new("RGB", (400, 100), (128, 128, 128))
                    for box in range(3):
                        image.paste((211, 211, 211), (150 * box, 0, 150 * box + 100, 100))
                        colour = colours[(box + k) % 3]
                        image.paste(colour, (150 * box + 10 * n, 20, 150 * box + 10 * n + 30, 50 + m))
                    path = root / split / "images" / "0" / f"{split}-{n}-{m}-{k}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
                rows.append({"sentence": f"box {n} is red", "label": ("true", "false")[m // 2], "evals": {"r0": "true"},
                             "identifier": f"{n}-{m}", "directory": "0", "structured_rep": [[], [], []]})  # fmt: skip
        write_lines(root / split / f"{split}.json", rows)


def snli_ve(root: Path, images: int = 2) -> None:
    """Three hypotheses for each image of flickr30k-images, whose sentence1 is the caption."""
    number = 1000
    for split in ("train", "dev", "test"):
        rows = []
        for _ in range(images):
            write_image(root / "flickr30k-images" / f"{number}.jpg", number)
            for k, label in enumerate(("neutral", "contradiction", "entailment")):
                rows.append({"Flickr30K_ID": str(number), "annotator_labels": [label], "captionID": f"{number}.jpg#0",
                             "gold_label": label, "pairID": f"{number}.jpg#0r{k}{label[0]}", "sentence1": "the premise",
                             "sentence1_parse": "( x )", "sentence2": f"hypothesis «{k}» of {number}"})  # fmt: skip
            number += 1
        write_lines(root / f"snli_ve_{split}.jsonl", rows)


def refcoco(root: Path, images: Path | None = None, images_each: int = 2, protocol: int = 0) -> None:
    """Two expressions for an object in each image. The pickle is of Python 2's default protocol, 0."""
    refs, annotations, listed = [], [], []
    for s, split in enumerate(("train", "val", "testA", "testB")):
        for i in range(images_each):
            number = 200 + images_each * s + i
            write_image((images or root) / "train2014" / f"COCO_train2014_{number:012d}.jpg", number)
            listed.append({"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg", "width": 72, "height": 54})
            annotations.append({"id": 5000 + number, "image_id": number, "bbox": [4.5, 6, 30.25, 20], "area": 500.0,
                                "segmentation": [[1, 2, 3, 4, 5, 6]], "iscrowd": 0, "category_id": 1})  # fmt: skip
            sentences = [{"tokens": ["red", "one"], "raw": "red one!", "sent_id": 10 * number + k,
                          "sent": ("red one", "the café on the left")[k]} for k in (0, 1)]  # fmt: skip
            refs.append({"sent_ids": [10 * number, 10 * number + 1], "image_id": number, "ref_id": 70 + number,
                         "file_name": f"COCO_train2014_{number:012d}_3.jpg", "ann_id": 5000 + number, "split": split,
                         "category_id": 1, "sentences": sentences})  # fmt: skip
    (root / "refcoco+").mkdir(parents=True, exist_ok=True)
    (root / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    content = {"info": {}, "images": listed, "annotations": annotations, "licenses": []}
    write_json(root / "refcoco+/instances.json", {**content, "categories": [{"id": 1, "name": "person"}]})


def clip_benchmark(root: Path, retrieval: bool = False, each: int = 3) -> None:
    """Tars of webp images with .cls, and names and templates; or with .txt for retrieval."""
    root.mkdir(parents=True)
    if retrieval:
        (root / "dataset_type.txt").write_text("retrieval")
    else:
        (root / "classnames.txt").write_text("alarm clock\ncafé\n\n", encoding="utf-8")
        (root / "zeroshot_classification_templates.txt").write_text("a bad photo of a {c}.\n{c}\n")
    for number, split in enumerate(("train", "test")):
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text("2\n")
        for shard in range(2):
            with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
                for k in range(each):
                    i = 100 * number + each * shard + k
                    text = f"caption {i}\nanother\n" if retrieval else f"{i % 2}"
                    members = [(f"s{each * shard + k:07d}.webp", encoded(make_image(i), "WEBP")),
                               (f"s{each * shard + k:07d}.{'txt' if retrieval else 'cls'}", text.encode())]  # fmt: skip
                    add_members(tar, members)


def evil_pickle(path: Path, wanted: Path) -> None:
    """A pickle that writes the file `wanted` when it is loaded without care."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (wanted,)

    path.write_bytes(pickle.dumps([{"split": "train"}, Evil()]))
    pickle.loads(path.read_bytes())
    assert wanted.exists()
    wanted.unlink()
