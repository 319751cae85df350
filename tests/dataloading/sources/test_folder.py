"""Folders of images, with captions in text files or in a table."""

import json
import os

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.sources.files import read_json_list
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.questions import questions
from mvlm_dataloading.sources.record import safe_key
from support import published
from support.data import build_source, read_json_lines


def test_folder_with_text_files(tmp_path):
    published.folder(tmp_path / "images")
    names = {safe_key(f"{'ab'[i % 2]}/{i}"): published.captions(i) for i in range(6)}
    assert build_source(folder(tmp_path / "images"), tmp_path / "out") == {"train": names}
    assert open_dataset(tmp_path / "out", "train").metadata(0)["file"] == "a/0.jpg"


def test_folder_with_a_table(tmp_path):
    published.folder(tmp_path / "images", sidecars=False)
    names = {safe_key(f"{'ab'[i % 2]}/{i}"): published.captions(i) for i in range(6)}
    table = folder(tmp_path / "images", tmp_path / "images/captions.csv")
    assert build_source(table, tmp_path / "csv") == {"train": names}
    found = build_source(folder(tmp_path / "images", tmp_path / "images/captions.jsonl"), tmp_path / "jsonl")
    assert {split: len(part) for split, part in found.items()} == {"test": 2, "train": 2, "validation": 2}
    assert {**found["train"], **found["validation"], **found["test"]} == names


def test_captions_in_the_format_of_coco(tmp_path):
    published.folder(tmp_path / "images", 3, sidecars=False)
    images = [{"id": i, "file_name": name} for i, name in enumerate(["a/0.jpg", "./b/1.jpg", "../a/2.jpg", "a/3.jpg"])]
    texts = [(1, "one"), (0, "zero"), (1, "two"), (2, "outside"), (3, "no file")]
    content = {"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in texts]}
    published.write_json(tmp_path / "captions.json", content)
    source = folder(tmp_path / "images", tmp_path / "captions.json")
    wanted = {safe_key("a/0"): ["zero"], safe_key("b/1"): ["one", "two"]}
    assert build_source(source, tmp_path / "out") == {"train": wanted}
    reasons = [line["reason"] for line in read_json_lines(tmp_path / "out/rejected.jsonl")]
    assert reasons == ["image is outside the folder", "image file is missing"]
    with pytest.raises(DataError, match="columns"):
        folder(tmp_path / "images", tmp_path / "captions.json", caption_column=("text",))
    published.write_json(tmp_path / "captions.json", [{"image": "a/0.jpg", "caption": "zero"}])
    with pytest.raises(DataError, match="images, annotations"):
        folder(tmp_path / "images", tmp_path / "captions.json")


def test_several_columns_of_captions_are_read_in_their_order(tmp_path):
    published.folder(tmp_path / "images", 2, sidecars=False)
    rows = [{"image": "a/0.jpg", "long": ["one", "two"], "short": "three"}, {"image": "b/1.jpg", "short": "four"}]
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = folder(tmp_path / "images", table, caption_column=("long", "short"))
    wanted = {safe_key("a/0"): ["one", "two", "three"], safe_key("b/1"): ["four"]}
    assert build_source(both, tmp_path / "out") == {"train": wanted}
    with pytest.raises(DataError, match="lang"):
        folder(tmp_path / "images", table, caption_column=("long", "lang"))


def test_questions_have_the_split_of_their_image(tmp_path):
    published.folder(tmp_path / "images", 20)
    build_source(folder(tmp_path / "images", validation=0.3, test=0.2), tmp_path / "images-alone")
    table = tmp_path / "images/questions.csv"
    table.write_text(table.read_text() + "a/0.jpg,again?, \n../x.jpg,where?,there\nz.jpg,no file?,no\n")
    asked = build_source(questions(tmp_path / "images", table, validation=0.3, test=0.2), tmp_path / "asked")
    keys = [key for split in asked.values() for key in split]
    assert sorted(map(int, keys)) == list(range(1, 41))
    for split, samples in asked.items():
        images, dataset = (open_dataset(tmp_path / name, split) for name in ("images-alone", "asked"))
        assert len(dataset) == 2 * len(images)
        facts = [dataset.metadata(i) for i in range(len(dataset))]
        assert {one["image_id"] for one in facts} == {images.metadata(i)["file"] for i in range(len(images))}
        for one in facts:
            row = int(one["question_id"])
            assert samples[str(row)] == [("what is it?", "whose?")[(row - 1) % 2]]
            answers = {answer["answer"] for answer in one["answers"]}
            assert (answers, len(one["answers"])) == ({f"{('what', 'whos')[(row - 1) % 2]} {(row - 1) // 2}"}, 10)
    rejected = {line["key"]: line["reason"] for line in read_json_lines(tmp_path / "asked/rejected.jsonl")}
    reasons = ("question has no answers", "image is outside the folder", "image file is missing")
    assert rejected == dict(zip(("41", "42", "43"), reasons, strict=True))


def test_splits_by_hash_depend_on_the_name_alone(tmp_path):
    published.folder(tmp_path / "images", 40)
    few = {record.key: piece.split for piece in folder(tmp_path / "images", validation=0.2, test=0.2).pieces
           for record in piece.records(1 << 20)}  # fmt: skip
    published.folder(tmp_path / "images", 60)
    many = {record.key: piece.split for piece in folder(tmp_path / "images", validation=0.2, test=0.2).pieces
            for record in piece.records(1 << 20)}  # fmt: skip
    assert few.items() <= many.items()
    counts = [list(many.values()).count(split) for split in ("train", "validation", "test")]
    assert min(counts) >= 4
    assert counts[0] > 24


@pytest.mark.parametrize("table", [False, True])
def test_images_that_share_a_stem_are_two_samples(tmp_path, table):
    """Both are in the split that either has alone."""
    for i in range(10):
        published.write_image(tmp_path / f"images/{i}.jpg", i)
        (tmp_path / f"images/{i}.txt").write_text(f"number {i}\n")
    published.make_image(20).save(tmp_path / "images/1.png")
    rows = [*(f"{i}.jpg,number {i}" for i in range(10)), "1.png,number 1"]
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *rows]))

    def build(name: str) -> dict[str, dict[str, list[str]]]:
        source = folder(tmp_path / "images", tmp_path / "table.csv" if table else None, validation=0.5)
        return build_source(source, tmp_path / name)

    found = build("out")
    assert {**found["train"], **found["validation"]} == {
        **{str(i): [f"number {i}"] for i in range(10) if i != 1},
        safe_key("1.jpg"): ["number 1"],
        safe_key("1.png"): ["number 1"],
    }
    (tmp_path / "images/1.png").unlink()
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *rows[:-1]]))
    for split, samples in build("alone").items():
        assert ({"1"} <= samples.keys()) == ({safe_key("1.jpg"), safe_key("1.png")} <= found[split].keys())


def test_captions_in_another_encoding_are_rejected_one_by_one(tmp_path):
    """Spreadsheets write cp1252. Its non-ASCII captions are rejected, and the others stay."""
    names = ["0.jpg", "1.jpg", "é.jpg"]
    for i, name in enumerate(names):
        published.write_image(tmp_path / os.fsdecode(name.encode("cp1252")), i)
    texts = ["un café à Paris", "a plain one", "a plain one too"]
    rows = list(zip(names, texts, strict=True))
    for file, text in (
        ("c.csv", "image,caption\n" + "\n".join(map(",".join, rows))),
        ("c.jsonl", "\n".join(f'{{"image": "{name}", "caption": "{text}"}}' for name, text in rows)),
        ("c.token", "\n".join(f"{name}#0\t{text}" for name, text in rows)),
        ("results.csv", "image_name| comment_number| comment\n" + "\n".join(map("| 0| ".join, rows))),
    ):
        (tmp_path / file).write_bytes(text.encode("cp1252"))
        source = (folder if file.startswith("c.") and "token" not in file else flickr30k)(tmp_path, tmp_path / file)
        out = tmp_path / f"out of {file}"
        assert [*build_source(source, out)["train"].values()] == [["a plain one"], ["a plain one too"]], file
        rejected = [(line["key"], line["reason"]) for line in read_json_lines(out / "rejected.jsonl")]
        assert rejected == [("0", "caption is not valid Unicode")], file
    (tmp_path / "list.json").write_bytes('["é", "e"]'.encode("cp1252"))
    assert list(read_json_list(tmp_path / "list.json")) == ["\udce9", "e"]


def test_every_spelling_of_a_file_is_one_image(tmp_path):
    published.folder(tmp_path / "images", sidecars=False)
    accent = "caf\u00e9.jpg"
    (tmp_path / "images/a/0.jpg").rename(tmp_path / "images/a" / accent)
    names = [f"a/{accent}", f"./a/{accent}", f"a//{accent}", f"a\\{accent}", "a/cafe\u0301.jpg"]
    names.append(str(tmp_path / "images/a" / accent))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(names)))
    found = build_source(folder(tmp_path / "images", tmp_path / "t.csv"), tmp_path / "out")
    assert list(found["train"].values()) == [[f"text {i}" for i in range(6)]]
    (tmp_path / "t.csv").write_text("image,caption\na/../../t.csv,x\n..\\t.csv,x\nb/1.jpg,y\n")
    found = build_source(folder(tmp_path / "images", tmp_path / "t.csv"), tmp_path / "other")
    assert list(found["train"].values()) == [["y"]]


def test_a_row_of_json_may_leave_out_a_caption_that_is_null(tmp_path):
    lines = ['{"image": "a/0.jpg", "caption": "x"}', '{"image": "a/0.jpg"}', '{"image": "b/1.jpg", "caption": ["y"]}']
    published.folder(tmp_path / "images", sidecars=False)
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = build_source(folder(tmp_path / "images", tmp_path / "t.jsonl"), tmp_path / "out")
    assert list(found["train"].values()) == [["x"], ["y"]]


@pytest.mark.parametrize("table", [False, True])
def test_folders_named_as_evaluation_splits_are_kept_out_of_training(tmp_path, table):
    """Shares divide the others. A deeper folder, and train, which may be a class, state no split."""
    places = ["train", "val", "test_images", "cars/test"]
    names = [f"{place}/{i}" for place in places for i in range(10)]
    for i, name in enumerate(names):
        published.write_image(tmp_path / f"images/{name}.jpg", i)
        (tmp_path / f"images/{name}.txt").write_text("a caption")
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *(f"{name}.jpg,a caption" for name in names)]))
    given = tmp_path / "table.csv" if table else None

    def splits(test: float) -> dict[str, set[str]]:
        pieces = folder(tmp_path / "images", given, test=test).pieces
        return {piece.split: {record.where[:-6] for record in piece.records(1)} for piece in pieces}

    assert splits(0.0) == {"train": {"train", "cars/test"}, "validation": {"val"}, "test": {"test_images"}}
    assert splits(0.5) == {
        "train": {"train", "cars/test"},
        "validation": {"val"},
        "test": {"train", "cars/test", "test_images"},
    }


def test_a_table_decides_over_the_folders_names(tmp_path):
    published.write_image(tmp_path / "test/0.jpg", 0)
    (tmp_path / "table.csv").write_text("image,caption,split\ntest/0.jpg,a caption,train\n")
    assert [piece.split for piece in folder(tmp_path, tmp_path / "table.csv").pieces] == ["train"]


@pytest.mark.parametrize(
    "name, split",
    [("testA", "test"), ("val2017", "validation"), ("Dev-photos", "validation"), ("test tubes", "train"),
     ("tests", "train"), ("trains", "train"), ("valley", "train")],
)  # fmt: skip
def test_an_album_is_no_split(tmp_path, name, split):
    published.write_image(tmp_path / f"images/{name}/0.jpg", 0)
    assert [piece.split for piece in folder(tmp_path / "images").pieces] == [split]


def test_a_data_set_inside_the_folder_of_images_is_left_out(tmp_path):
    published.folder(tmp_path / "images", 3)
    before = folder(tmp_path / "images").pieces[0].label
    out = tmp_path / "images" / "out"
    found = build_source(folder(tmp_path / "images"), out)
    (out / "contact-sheet.png").write_bytes((tmp_path / "images" / "a" / "0.jpg").read_bytes())
    assert build_source(folder(tmp_path / "images"), out) == found
    # A file of that name that describes no build hides nothing.
    (tmp_path / "images" / "a" / "dataset.json").write_text('{"recipe": {}, "splits": []}')
    assert folder(tmp_path / "images").pieces[0].label == before
