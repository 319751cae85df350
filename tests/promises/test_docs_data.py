"""Every command in docs/guides/data.md runs as written, in order, on small sets in the published formats."""

import contextlib
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mvlm import cli
from mvlm.commands import data_tools
from mvlm_dataloading import open_dataset
from support import published, published_tasks
from support.data import file_contents, wave_tokenizer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    """A folder with all downloads that the page mentions."""
    folder = tmp_path_factory.mktemp("docs")
    downloads = folder / "downloads"
    published.coco(downloads / "coco")
    published.flickr30k(downloads / "flickr30k")
    published.visual_genome(downloads / "visual-genome")
    published.img2dataset(downloads / "cc3m" / "train", first=100)
    published.img2dataset(downloads / "cc3m" / "validation", first=200, tars=1)
    published.img2dataset(downloads / "sbu", first=7)  # some are in COCO's evaluation splits
    published.folder(downloads / "images", 20)
    (downloads / "tars").mkdir()
    with tarfile.open(downloads / "tars" / "train-000.tar", "w") as tar:
        for i in range(4):
            members = [(f"{i}.jpg", published.encoded(published.make_image(i))), (f"{i}.txt", b"words")]
            published.add_members(tar, members)
    (downloads / "rows").mkdir()
    rows = [
        {"image": {"bytes": published.encoded(published.make_image(i)), "path": None}, "caption": f"row {i}"}
        for i in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), downloads / "rows" / "train-00000-of-00001.parquet")
    published_tasks.vqa_v2(downloads / "vqa")
    published_tasks.visual_genome_qa(downloads / "visual-genome")
    published_tasks.nlvr2(downloads / "nlvr2")
    published_tasks.nlvr(downloads / "nlvr")
    published_tasks.snli_ve(downloads / "snli-ve")
    wave_tokenizer().save(downloads / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def printed(downloads) -> dict[str, str]:
    """The output of each command. The first uses worker processes; the others run in this one, to save time."""
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    named = {" ".join(shlex.split(line)[1:3]) for line in commands}
    packages = ("emoji", "twemoji", "easy-vqa", "iconify", "scenes")
    packaged = {f"data {name}" for name in packages}  # they need no download
    assert named == {name for name in cli.COMMANDS if name.startswith("data ")} - packaged
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(downloads)
        for line in commands:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                cli.run_command(shlex.split(line)[1:])
            found[line] = text.getvalue()
            patch.setattr(data_tools, "processes", lambda given, pieces=None: 0)
    return found


def counts(folder: Path) -> dict[str, int]:
    return {
        split: part["samples"] for split, part in json.loads((folder / "dataset.json").read_text())["splits"].items()
    }


def test_commands_of_the_data_page_run(printed, downloads):
    data = downloads / "data"
    assert {folder.name: counts(folder) for folder in sorted(data.iterdir())} == {
        "coco": {"train": 9, "validation": 1, "test": 2},
        "coco-of-parts": {"train": 9, "validation": 1, "test": 2},
        "cc3m": {"train": 8, "validation": 4},
        "sbu": {"train": 6},  # 8 were downloaded; two of them are in COCO's evaluation splits
        "flickr30k": {"train": 4, "validation": 1, "test": 1},
        "visual-genome": {"train": 6},
        "mine": counts(data / "mine"),
        "table": {"train": 7, "validation": 7, "test": 6},
        "tokens": {"train": 20},
        "tars": {"train": 4},
        "rows": {"train": 3},
        "vqa": {"train": 12, "validation": 12, "test": 6},
        "vqa-held-out": {"train": 21, "validation": 3, "test": 6},
        "visual-genome-qa": {"train": 7},
        "nlvr2": {"train": 6, "validation": 6, "test": 6},
        "nlvr": {"train": 24, "validation": 4, "test": 4},
        "snli-ve": {"train": 6, "validation": 6, "test": 6},
        "mix": counts(data / "mix"),
        "half": counts(data / "half"),
    }
    assert file_contents(data / "coco-of-parts").items() <= file_contents(data / "coco").items()  # that has a sheet too
    assert sum(counts(data / "mine").values()) == 20
    assert counts(data / "mix").keys() == {"train", "validation", "test"}
    assert 0 < counts(data / "half")["train"] < counts(data / "mix")["train"]
    for line, text in printed.items():
        assert text.strip(), line
    with Image.open(data / "coco" / "contact-sheet.png") as sheet:
        assert sheet.width == 1352
    assert len(open_dataset(downloads / "downloads" / "tars", "train")) == 4


def test_rejection_reasons_of_the_code_are_on_the_data_page(printed, downloads):
    known = set(re.findall(r"`([^`]+)`", PAGE.read_text().split("## What is rejected")[1].split("Captions lose")[0]))
    found = {
        json.loads(line)["reason"]
        for file in downloads.glob("data/*/rejected.jsonl")
        for line in file.read_text().splitlines()
    }
    assert found
    assert found <= known


def test_python_of_the_data_page_runs(printed, downloads, monkeypatch, capsys):
    monkeypatch.chdir(downloads)
    for block in blocks("python"):
        exec(block, {})
    assert "torch.Size([4, 3, 224, 224])" in capsys.readouterr().out
