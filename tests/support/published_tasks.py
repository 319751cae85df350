"""Small data sets of downstream tasks, written as published, with the odd rows that the real ones have."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from .published import encoded, make_image, write_image, write_json

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
