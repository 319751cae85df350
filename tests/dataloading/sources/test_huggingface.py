"""Rows of Hugging Face `datasets`: parquet files and `save_to_disk`."""

import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading import DataError
from mvlm_dataloading.sources.huggingface import huggingface
from mvlm_dataloading.sources.record import safe_key
from support import published
from support.data import build_source


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
    found = build_source(huggingface([tmp_path], key_column="id"), tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i) for i in range(4)],
        "test": [published.captions(4)],
    }
    assert safe_key("row 0") in found["train"]
    with pytest.raises(DataError, match="wanted a column named text, found image, caption, id"):
        huggingface([tmp_path], caption_column="text")
    with pytest.raises(DataError, match=r"test\.parquet: wanted each file once, found it twice"):
        huggingface([tmp_path, tmp_path / "data/test.parquet"])


def test_a_table_without_rows_is_refused_by_name(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)).slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"wanted at least one sample, found none; no image .*train\.parquet 0; name"):
        build_source(huggingface([tmp_path / "train.parquet"]), tmp_path / "out")


def test_another_split_is_another_data_set(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(hub_rows(2)), tmp_path / "rows.parquet")
    build_source(huggingface([tmp_path / "rows.parquet"], split="train"), tmp_path / "out")
    with pytest.raises(DataError):
        build_source(huggingface([tmp_path / "rows.parquet"], split="test"), tmp_path / "out")


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
        huggingface([tmp_path])


def test_parquet_as_the_hub_converts_it(tmp_path):
    for place in ("partial-train", "partial-validation", "test"):
        (tmp_path / "default" / place).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)), tmp_path / f"default/{place}/0000.parquet")
    assert [piece.split for piece in huggingface([tmp_path]).pieces] == ["train", "validation", "test"]


@pytest.mark.parametrize("name", ["testA", "testdev", "test2015", "eval", "minival"])
def test_evaluation_splits_of_other_names_do_not_become_training_data(tmp_path, name):
    for split in ("train", name):
        file = tmp_path / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)), file)
    with pytest.raises(
        DataError, match=f"wanted a split named .*, found '{name.lower()}'; rename it, or name .* --split"
    ):
        huggingface([tmp_path])
    assert [piece.split for piece in huggingface([file], split="test").pieces] == ["test"]


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
    source = huggingface([tmp_path / "saved"], image_column="picture", caption_column="text")
    assert len(source.pieces) == 3
    found = build_source(source, tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i)[:1] for i in range(7)],
        "validation": [published.captions(i)[:1] for i in (7, 8)],
    }
    one = build_source(
        huggingface([tmp_path / "saved/train"], image_column="picture", caption_column="text", test=0.4),
        tmp_path / "one",
    )
    assert len(one["train"]) + len(one["test"]) == 7
