"""Rows of Hugging Face `datasets`: parquet files and `save_to_disk`."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet

from mvlm_dataloading import DataError
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


def hub_rows(count: int) -> list[dict]:
    return [
        {"image": {"bytes": published.encoded(published.make_image(i)), "path": f"{i}.jpg"},
         "caption": published.captions(i), "id": f"row {i}"}
        for i in range(count)
    ]  # fmt: skip


def test_parquet_of_the_hub(tmp_path):
    rows = hub_rows(5)
    (tmp_path / "data").mkdir()
    for name, part in (("train-00000-of-00002", rows[:2]), ("train-00001-of-00002", rows[2:4]), ("test", rows[4:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"data/{name}.parquet")
    found = build_source(huggingface(tmp_path, key_column="id"), tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i) for i in range(4)],
        "test": [published.captions(4)],
    }
    assert safe_key("row 0") in found["train"]
    with pytest.raises(DataError, match="wanted a column named text, found image, caption, id"):
        huggingface(tmp_path, caption_column="text")
    with pytest.raises(DataError, match=r"test\.parquet: wanted each file once, found it twice"):
        huggingface(tmp_path, [tmp_path / "data/test.parquet"])


def test_a_table_without_rows_is_refused_by_name(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)).slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"wanted at least one sample, found none; no image .*train\.parquet 0; name"):
        build_source(huggingface(tmp_path / "train.parquet"), tmp_path / "out")


def test_another_split_is_another_data_set(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(hub_rows(2)), tmp_path / "rows.parquet")
    build_source(huggingface(tmp_path / "rows.parquet", split="train"), tmp_path / "out")
    with pytest.raises(DataError):
        build_source(huggingface(tmp_path / "rows.parquet", split="test"), tmp_path / "out")


@pytest.mark.parametrize(
    "name, content",
    [
        ("state.json", {"epoch": 3}),
        ("state.json", [1]),
        ("state.json", {"_data_files": [{"filename": 7}]}),
        ("dataset_dict.json", ["train"]),
        ("dataset_dict.json", {"splits": [1]}),
    ],
)
def test_files_of_other_tools_with_the_same_names_are_refused(tmp_path, name, content):
    published.write_json(tmp_path / name, content)
    with pytest.raises(DataError, match=r"wanted a folder of save_to_disk, found .*; save the rows again"):
        huggingface(tmp_path)


def test_parquet_as_the_hub_converts_it(tmp_path):
    for place in ("partial-train", "partial-validation", "test"):
        (tmp_path / "default" / place).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)), tmp_path / f"default/{place}/0000.parquet")
    assert [piece.split for piece in huggingface(tmp_path).pieces] == ["train", "validation", "test"]


@pytest.mark.parametrize("name", ["testA", "testdev", "eval", "minival"])
def test_evaluation_splits_of_other_names_do_not_become_training_data(tmp_path, name):
    for split in ("train", name):
        file = tmp_path / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)), file)
    with pytest.raises(
        DataError, match=f"wanted a split named .*, found '{name.lower()}'; rename it, or name .* --split"
    ):
        huggingface(tmp_path)
    assert [piece.split for piece in huggingface(file, split="test").pieces] == ["test"]


def test_a_column_of_splits_decides_over_the_name_of_the_file(tmp_path):
    splits = ["train", "val", "test", "restval", None, ""]
    rows = [{**row, "split": split} for row, split in zip(hub_rows(6), splits, strict=True)]
    file = write(tmp_path / "rows/test-0.parquet", rows)
    with pytest.raises(DataError, match="wanted rows of test as the name states, found train in the column split; "):
        huggingface(file)
    found = build_source(huggingface(file, key_column="id", split_column="split"), tmp_path / "out")
    assert {split: [*part] for split, part in found.items()} == {
        split: [safe_key(f"row {i}") for i in numbers]
        for split, numbers in (("train", (0, 3)), ("validation", (1,)), ("test", (2, 4, 5)))
    }
    assert [piece.split for piece in huggingface(file, split="train").pieces] == ["train"]


def test_shares_divide_the_train_rows_of_a_column_of_splits(tmp_path):
    rows = [{**row, "part": "dev" if i < 3 else "train"} for i, row in enumerate(hub_rows(40))]
    file = write(tmp_path / "rows/0.parquet", rows)
    source = huggingface(file, key_column="id", split_column="part", test=0.3)
    found = {piece.split: [record.where for record in piece.records(1 << 20)] for piece in source.pieces}
    assert found["validation"] == [f"0.parquet row {i}" for i in range(3)]
    assert min(len(found["train"]), len(found["test"])) >= 4
    assert sorted(found["train"] + found["test"]) == sorted(f"0.parquet row {i}" for i in range(3, 40))


@pytest.mark.parametrize("value", ["testA", "fold 3", 2, ["train"]])
def test_a_column_of_splits_with_other_values_is_refused(tmp_path, value):
    file = write(tmp_path / "0.parquet", [{**row, "split": value} for row in hub_rows(1)])
    with pytest.raises(DataError, match=r"wanted train, validation or test in the column split, found .*; correct"):
        huggingface(file)
    assert [piece.split for piece in huggingface(file, split="val").pieces] == ["validation"]


def test_a_split_and_a_column_of_splits_together_are_refused(tmp_path):
    file = write(tmp_path / "0.parquet", hub_rows(1))
    with pytest.raises(DataError, match="wanted one of --split and --split-column, got test and part; give one"):
        huggingface(file, split="test", split_column="part")
    with pytest.raises(DataError, match="wanted a column named part, found image, caption, id"):
        huggingface(file, split_column="part")


def test_any_word_of_a_file_or_folder_name_states_the_split(tmp_path):
    names = {
        "train": ["pets-train", "other/latest"],
        "validation": ["validation/lang=en/part-0", "lang=fr/coco_val2017"],
        "test": ["pets-test", "pets-test-images/a/0", "test2015-0"],
    }
    for split, paths in names.items():
        for path in paths:
            write(tmp_path / f"rows/{path}.parquet", [{**hub_rows(1)[0], "caption": split}])
    pieces = huggingface(tmp_path / "rows").pieces
    assert len(pieces) == 7
    for piece in pieces:
        assert [list(record.captions) for record in piece.records(1 << 20)] == [[piece.split]]


def test_the_given_folder_states_the_split_of_files_that_state_none(tmp_path):
    write(tmp_path / "pets-test/0.parquet", hub_rows(1))
    write(tmp_path / "pets-test/train.parquet", hub_rows(1))
    assert [piece.split for piece in huggingface(tmp_path / "pets-test").pieces] == ["test", "train"]


@pytest.mark.parametrize("stored, split", [(None, "test"), ("train", "train")])
def test_the_folder_of_save_to_disk_states_the_split_that_was_not_stored(tmp_path, stored, split):
    """A column of splits is read there too."""
    table = pyarrow.Table.from_pylist([{**row, "split": None if i else "val"} for i, row in enumerate(hub_rows(70))])
    (tmp_path / "pets-test").mkdir()
    with ipc.new_stream(tmp_path / "pets-test/data.arrow", table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": stored}
    published.write_json(tmp_path / "pets-test/state.json", state)
    pieces = huggingface(tmp_path / "pets-test", key_column="id").pieces
    counts = {piece.split: sum(1 for _ in piece.records(1 << 20)) for piece in pieces}
    assert counts == {"validation": 1, split: 69}


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


def test_a_key_in_two_splits_is_refused(tmp_path):
    rows = [{**row, "split": split} for row, split in zip(flattened(1, 2), ("train", "test"), strict=True)]
    source = huggingface(write(tmp_path / "0.parquet", rows), key_column="id")
    with pytest.raises(DataError, match="row 1: wanted one split for the key image0, found train and test; correct"):
        build_source(source, tmp_path / "out")


def test_rows_without_a_key_are_refused(tmp_path):
    file = write(tmp_path / "0.parquet", [{**row, "id": row["id"] if i else None} for i, row in enumerate(hub_rows(3))])
    message = "wanted a key in every row of the column id, found none in 1 of 3; fill them in, or leave --key-column"
    with pytest.raises(DataError, match=message):
        huggingface(file, key_column="id")


def test_builds_of_an_earlier_version_are_not_resumed(tmp_path):
    """It assigned rows to splits by their numbers, and its recipe had no revision of the rows."""
    file = write(tmp_path / "0.parquet", hub_rows(3))
    source = huggingface(file)
    earlier = {name: value for name, value in source.recipe.items() if name != "rows_revision"}
    build_source(replace(source, recipe=earlier), tmp_path / "out")
    with pytest.raises(DataError, match="out: wanted"):
        build_source(source, tmp_path / "out")


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
    source = huggingface(tmp_path / "saved", image_column="picture", caption_column="text")
    assert len(source.pieces) == 3
    found = build_source(source, tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i)[:1] for i in range(7)],
        "validation": [published.captions(i)[:1] for i in (7, 8)],
    }
    one = build_source(
        huggingface(tmp_path / "saved/train", image_column="picture", caption_column="text", test=0.4),
        tmp_path / "one",
    )
    assert len(one["train"]) + len(one["test"]) == 7
