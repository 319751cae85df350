"""`mvlm data ...` commands that build shards, and wrong arguments of all `mvlm data` commands."""

import json
import shutil

import pyarrow
import pytest
from pyarrow import parquet

import mvlm_dataloading
from support.commands import assert_refused


def test_a_built_data_set_names_its_options(data_set):
    recipe = json.loads((data_set / "dataset.json").read_text())["recipe"]
    assert (recipe["shard_bytes"], recipe["max_pixels"], recipe["revision"]) == (20000, 50_000_000, 3)


def test_data_emoji_builds_the_emoji_data_set(run_mvlm, scenes, tmp_path, monkeypatch):
    calls = []

    def build(out, size, **_):
        calls.append((out, size))
        shutil.copytree(scenes, out)

    monkeypatch.setattr(mvlm_dataloading, "build_emoji", build)
    outcome = run_mvlm("data", "emoji", tmp_path / "emoji", "--size", 64)
    assert outcome.code == 0
    assert calls == [(tmp_path / "emoji", 64)]
    assert outcome.out == [f"{tmp_path / 'emoji'}: 32 train, 8 validation, 8 test"]


@pytest.mark.parametrize("column, words", [("split", []), ("part", ["--split-column", "part"])])
def test_data_huggingface_reads_a_column_of_splits(image_folder, tmp_path, run_data, column, words):
    images = [(image_folder / f"{i}.png").read_bytes() for i in range(3)]
    rows = {"image": images, "caption": ["one", "two", "three"], column: ["train", "val", "test"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    outcome = run_data("huggingface", tmp_path / "rows.parquet", tmp_path / "out", *words)
    assert outcome.out[-1] == f"{tmp_path / 'out'}: 1 test, 1 train, 1 validation"


@pytest.mark.parametrize(
    "words, message",
    [
        (["folder", "no", "out"], "no: wanted a folder, found none"),
        (["folder", "{images}", "out", "--quality", "0"], "quality: wanted 1 to 100, got 0"),
        (["folder", "{images}", "out", "--max-pixels", "1000000000"], "max-pixels: wanted 1 to 89478485"),
        (["folder", "{images}", "{images}"], "wanted a new or an empty folder, found one in use"),
        (
            ["folder", "{images}", "out", "--tokenizer", "no.json"],
            "no.json: wanted a tokenizer.json, found no such file",
        ),
        (["folder", "{images}", "out", "--against", "no"], "no/dataset.json: wanted a file, found none"),
        (["check", "no"], "no: wanted a data folder, found none"),
        (["index", "{images}"], "wanted a folder of tars, found none"),
        (
            ["index", "{images}", "--without-tars"],
            "dataset.json: wanted the data set's description, found no such file",
        ),
        (["view", "out", "--sources", "no"], "no: wanted a data folder, found none"),
        (["huggingface", "no", "out"], "no: wanted parquet files or a folder of save_to_disk, found none"),
        (["coco", "{images}", "out"], "annotations: wanted a folder, found none"),
    ],
)
def test_wrong_arguments_of_data_commands_are_refused(image_folder, tmp_path, monkeypatch, run_data, words, message):
    monkeypatch.chdir(tmp_path)
    outcome = run_data(*(word.format(images=image_folder) for word in words))
    if words[0] == "check":  # it prints its table first
        outcome = type(outcome)(outcome.code, [], outcome.err)
    assert_refused(outcome, message)
    assert not list(tmp_path.iterdir())
