"""`mvlm data ...` commands that build shards."""

from collections.abc import Sequence
from pathlib import Path

import tyro

import mvlm_dataloading
from mvlm.cli import COMMANDS
from mvlm.commands.arguments import deferred, parse
from mvlm.commands.data import command_of
from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources import all_sources
from mvlm_dataloading.sources.record import ListedPiece, Record, Source


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
