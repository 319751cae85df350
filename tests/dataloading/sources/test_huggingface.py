"""Rows of Hugging Face `datasets`: parquet files and `save_to_disk`."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading.sources.huggingface import huggingface
from mvlm_dataloading.sources.record import safe_key
from support import published
from support.data import build_source, read_json_lines


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def flattened(count: int, each: int = 5) -> list[dict]:
    """A row for each caption: `each` rows of every image follow one another."""
    return [
        {"image": published.encoded(published.make_image(i)), "caption": f"image {i}, {k}", "id": f"image{i}"}
        for i in range(count)
        for k in range(each)
    ]


def test_parquet_of_the_hub(tmp_path):
    rows = published.hub_rows(5)
    (tmp_path / "data").mkdir()
    for name, part in (("train-00000-of-00002", rows[:2]), ("train-00001-of-00002", rows[2:4]), ("test", rows[4:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"data/{name}.parquet")
    found = build_source(huggingface(tmp_path, key_column="id"), tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i) for i in range(4)],
        "test": [published.captions(4)],
    }
    assert safe_key("row 0") in found["train"]


def test_a_column_of_splits_decides_over_the_name_of_the_file(tmp_path):
    splits = ["train", "val", "test", "restval", None, ""]
    rows = [{**row, "split": split} for row, split in zip(published.hub_rows(6), splits, strict=True)]
    file = write(tmp_path / "rows/test-0.parquet", rows)
    found = build_source(huggingface(file, key_column="id", split_column="split"), tmp_path / "out")
    assert {split: [*part] for split, part in found.items()} == {
        split: [safe_key(f"row {i}") for i in numbers]
        for split, numbers in (("train", (0, 3)), ("validation", (1,)), ("test", (2, 4, 5)))
    }
    assert [piece.split for piece in huggingface(file, split="train").pieces] == ["train"]


def test_any_word_of_a_file_or_folder_name_states_the_split(tmp_path):
    names = {
        "train": ["pets-train", "other/latest"],
        "validation": ["validation/lang=en/part-0", "lang=fr/coco_val2017", "default/partial-validation/0000"],
        "test": ["pets-test", "pets-test-images/a/0", "test2015-0"],
    }
    for split, paths in names.items():
        for path in paths:
            write(tmp_path / f"rows/{path}.parquet", [{**published.hub_rows(1)[0], "caption": split}])
    pieces = huggingface(tmp_path / "rows").pieces
    assert len(pieces) == 8
    for piece in pieces:
        assert [list(record.captions) for record in piece.records(1 << 20)] == [[piece.split]]
    write(tmp_path / "pets-test/0.parquet", published.hub_rows(1))  # the given folder states it too
    write(tmp_path / "pets-test/train.parquet", published.hub_rows(1))
    assert [piece.split for piece in huggingface(tmp_path / "pets-test").pieces] == ["test", "train"]


def test_rows_of_one_image_stay_in_one_split(tmp_path):
    file = write(tmp_path / "0.parquet", flattened(40))
    source = huggingface(file, validation=0.3, test=0.3)
    images = {piece.split: {record.image for record in piece.records(1 << 20)} for piece in source.pieces}
    assert min(map(len, images.values())) >= 4
    assert sum(map(len, images.values())) == 40
    # By this name an evaluation knows them as one image.
    named = {
        (record.image, record.metadata["image_id"]) for piece in source.pieces for record in piece.records(1 << 20)
    }
    assert len(named) == len({name for _, name in named}) == 40


def test_rows_of_one_key_are_one_sample_with_all_captions(tmp_path):
    """Also over the ends of batches. Other images of the key, and later rows, are rejected."""
    rows = flattened(20)
    other = {**rows[0], "id": "image19", "caption": "of another image"}
    file = write(tmp_path / "0.parquet", [*rows, other, {**rows[0], "caption": "too late"}])
    found = build_source(huggingface(file, key_column="id"), tmp_path / "out")
    assert found == {"train": {f"image{i}": [f"image {i}, {k}" for k in range(5)] for i in range(20)}}
    rejected = [(line["key"], line["reason"]) for line in read_json_lines(tmp_path / "out/rejected.jsonl")]
    assert rejected == [("image19", "key was used before"), ("image0", "key was used before")]


def test_captions_of_several_columns_are_those_of_one_sample(tmp_path):
    rows = [{**row, "also": [f"more of {row['caption']}"]} for row in flattened(2)[::5]]
    file = write(tmp_path / "0.parquet", rows)
    found = build_source(huggingface(file, key_column="id", caption_column=("caption", "also")), tmp_path / "out")
    wanted = {row["id"]: [row["caption"], f"more of {row['caption']}"] for row in rows}
    assert found == {"train": wanted}


@pytest.mark.slow
def test_folders_of_save_to_disk(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    parts = {}
    for split, numbers in (("train", range(7)), ("validation", range(7, 9))):
        columns = {
            "picture": [{"bytes": published.encoded(published.make_image(i), "PNG"), "path": None} for i in numbers],
            "text": [published.captions(i)[0] for i in numbers],
        }
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "validation": 1})
    source = huggingface(tmp_path / "saved", image_column="picture", caption_column=("text",))
    assert len(source.pieces) == 3
    found = build_source(source, tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i)[:1] for i in range(7)],
        "validation": [published.captions(i)[:1] for i in (7, 8)],
    }
    one = build_source(
        huggingface(tmp_path / "saved/train", image_column="picture", caption_column=("text",), test=0.4),
        tmp_path / "one",
    )
    assert len(one["train"]) + len(one["test"]) == 7
