"""`mvlm data ...` commands that build shards, and wrong arguments of all `mvlm data` commands."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest
import tyro
from pyarrow import parquet

import mvlm_dataloading
from mvlm.cli import COMMANDS
from mvlm.commands.arguments import deferred, parse
from mvlm.commands.data import command_of
from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources import all_sources
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support.commands import assert_refused


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
        (["folder", "{images}/0.png", "out"], "0.png: wanted a folder, found a file"),
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


def test_a_function_is_all_that_a_new_source_needs(tmp_path, image_folder):
    """Parameters before the slash stand alone, the others are flags, and a build has all options of builds."""

    def one_image(file: Path, /, caption: str = "words", *, times: Sequence[int] = (1,)) -> Source:
        """One image, as often as wanted.

        Args:
            file: The image.
            caption: Its caption.
            times: Numbers of the samples.
        """
        records = [Record(str(number), file, [caption], "") for number in times]
        return Source("one", "tests", "CC0", {}, [ListedPiece("train", records)])

    def run(*words: object) -> None:
        config = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
        parse(
            deferred(command_of(one_image)), [str(word) for word in words], prog="mvlm data one-image", config=config
        )()

    options = ("--caption", "a wave", "--times", 3, 4, "--short-side", 32, "--workers", 1)
    run(image_folder / "0.png", tmp_path / "out", *options)
    dataset = open_dataset(tmp_path / "out", "train")
    assert (dataset.keys.tolist(), dataset.captions(0), dataset.metadata(1)["height"]) == (["3", "4"], ["a wave"], 32)


def test_every_source_is_a_command_and_a_public_name():
    names = [name for name in dir(mvlm_dataloading) if name.startswith("from_")]
    assert [name.removeprefix("from_").replace("_", "-") for name in names] == sorted(all_sources())
    assert {f"data {name}" for name in all_sources()} <= set(COMMANDS)
    assert {"coco", "folder", "huggingface", "iconify", "nlvr2", "vqa-v2", "webdataset"} <= set(all_sources())
    from mvlm_dataloading import from_folder, from_vqa_v2  # pyright: ignore[reportAttributeAccessIssue]

    assert (from_folder, from_vqa_v2) == (all_sources()["folder"], all_sources()["vqa-v2"])


def test_sources_are_found_without_slow_packages():
    program = (
        "import sys, mvlm.cli\nassert 'data vqa-v2' in mvlm.cli.COMMANDS\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'pyarrow', 'nvidia.dali'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
