"""VQA v2 and Visual Genome QA, on files as published."""

import json
from pathlib import Path

import pytest

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.visual_genome import visual_genome_qa
from mvlm_dataloading.sources.vqa_v2 import vqa_v2
from support import published, published_tasks
from support.data import build_source, read_json_lines

TRAIN, VAL, TEST = range(100, 104), range(104, 108), range(108, 110)


def numbers(images, kinds=range(3)) -> list[str]:
    return [str(1000 * image + k) for image in images for k in kinds]


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_published_splits(tmp_path):
    published_tasks.vqa_v2(tmp_path)
    found = build_source(vqa_v2(tmp_path), tmp_path / "out")
    assert {split: list(known) for split, known in found.items()} == {
        "train": numbers(TRAIN),  # questions about an image follow one another
        "validation": numbers(VAL),
        "test": numbers(TEST),
    }
    assert found["train"]["100002"] == ["¿Cuántos?"]
    train, test = (open_dataset(tmp_path / "out", split) for split in ("train", "test"))
    facts = train.metadata(4)
    assert (facts["question_id"], facts["image_id"]) == (101001, "coco 101")
    assert (facts["question_type"], facts["answer_type"]) == ("is it", "yes/no")
    wanted = [{"answer": "yes", "answer_id": k} for k in range(1, 10)] + [{"answer": "ünsure", "answer_id": 10}]
    assert facts["answers"] == wanted
    assert train.metadata(5)["answers"][-1] == {"answer": "", "answer_id": 10}
    assert [("answers" in test.metadata(i), test.metadata(i).get("test_dev")) for i in range(6)] == [
        (False, True), (False, True), (False, None), (False, True), (False, None), (False, None),
    ]  # fmt: skip
    assert len({int(train.locate("image", i)[0]) for i in range(12)}) == 4  # each image is stored once
    assert train.image_bytes(5) == (tmp_path / "train2014/COCO_train2014_000000000101.jpg").read_bytes()


def test_part_of_val_is_held_out(tmp_path):
    published_tasks.vqa_v2(tmp_path)
    one, two = (build_source(vqa_v2(tmp_path, held_out=n), tmp_path / str(n)) for n in (1, 2))
    assert (len(one["validation"]), len(two["validation"])) == (3, 6)
    assert one["validation"].keys() < two["validation"].keys() < set(numbers(VAL))  # more keeps those of fewer
    for found in (one, two):
        assert sorted([*found["train"], *found["validation"]]) == numbers([*TRAIN, *VAL])
        assert len({key[:-3] for key in found["validation"]} & {key[:-3] for key in found["train"]}) == 0


@pytest.mark.parametrize(
    "content, wanted",
    [
        ([{"question_id": 104001, "img_id": "COCO_val2014_000000000104"}], ["104001"]),
        ([107000, 104001], ["104001", "107000"]),
        ({"images": [{"cocoid": 105, "split": "val"}, {"cocoid": 106, "split": "test"}]}, numbers([105])),
    ],
)
def test_a_file_chooses_the_validation_questions(tmp_path, content, wanted):
    published_tasks.vqa_v2(tmp_path)
    published.write_json(tmp_path / "minival.json", content)
    source = vqa_v2(tmp_path, minival=tmp_path / "minival.json")
    listed = {piece.split: [record.key for record in piece.records(1)] for piece in source.pieces}
    assert sorted(listed["validation"]) == wanted
    assert sorted(listed["train"] + wanted) == numbers([*TRAIN, *VAL])


def test_bad_rows_are_rejected_with_their_reasons(tmp_path):
    published_tasks.vqa_v2(tmp_path)
    (tmp_path / "train2014/COCO_train2014_000000000103.jpg").unlink()

    def questions(content):
        rows = {row["question_id"]: row for row in content["questions"]}
        rows[100000]["question"] = "  "
        rows[100001]["question"] = "line\nbreak\u202e?"
        content["questions"].append({**rows[101000], "question": "again?"})
        content["questions"] = [row for row in content["questions"] if row["question_id"] != 102000]

    def annotations(content):
        rows = {row["question_id"]: row for row in content["annotations"]}
        rows[100002]["answers"] = []
        content["annotations"] = [row for row in content["annotations"] if row["question_id"] != 101001]
        content["annotations"].append(rows[101002])

    edit(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", questions)
    edit(tmp_path / "v2_mscoco_train2014_annotations.json", annotations)
    found = build_source(vqa_v2(tmp_path), tmp_path / "out")["train"]
    assert found == {
        "100001": ["line break?"],
        "101000": [published_tasks.QUESTIONS[0]],
        "101002": [published_tasks.QUESTIONS[2]],
        "102001": [published_tasks.QUESTIONS[1]],
        "102002": [published_tasks.QUESTIONS[2]],
    }
    assert sorted((x["key"], x["reason"]) for x in read_json_lines(tmp_path / "out/rejected.jsonl")) == [
        ("100000", "no caption"),
        ("100002", "question has no answers"),
        ("101000", "key was used before"),
        ("101001", "question has no answers"),
        ("101002", "question has two annotations"),
        ("102000", "annotation has no question"),
        ("103000", "image file is missing"),
        ("103001", "image file is missing"),
        ("103002", "image file is missing"),
    ]


def test_visual_genome_qa(tmp_path):
    published_tasks.visual_genome_qa(tmp_path)
    published.write_json(tmp_path / "image_data.json", [{"image_id": 2407001, "coco_id": 77, "flickr_id": None}])
    found = build_source(visual_genome_qa(tmp_path), tmp_path / "out")["train"]
    assert list(found) == [f"vg{986000 + n}" for n in range(7)]  # the eighth has no answer
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(2)
    assert (facts["question_id"], facts["image_id"], facts["coco_id"]) == ("vg 986002", "visual-genome 2407001", 77)
    assert (facts["answer"], facts["answers"][0]) == ("Dark Blue.", {"answer": "dark blue", "answer_id": 1})
    assert len({one["answer_id"] for one in facts["answers"]}) == 10
    assert dataset.image_bytes(2) == (tmp_path / "VG_100K/2407001.jpg").read_bytes()
    assert read_json_lines(tmp_path / "out/rejected.jsonl")[0]["reason"] == "question has no answers"
    pieces = visual_genome_qa(tmp_path, validation=0.5).pieces
    images = {p.split: {r.metadata["image_id"] for r in p.records(1)} for p in pieces}
    assert images["train"].isdisjoint(images["validation"])
    assert len(set().union(*images.values())) == 4
