"""Examples of the pages on using a trained model run as written, on a micro model and a small data set."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mvlm.cli import run_command
from support.demo_folder import write_demo_folder

ROOT = Path(__file__).parents[2]


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the files that the pages name: runs/demo, data/emoji, cat.png and dog.png."""
    write_demo_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples_of_the_python_page_run(folder, capsys):
    names: dict = {}
    for block in blocks("python", "guides/python.md"):
        exec(block, names)
    assert names["images"].shape == (2, 8)
    assert names["gallery"].shape == (8, 8)
    assert sorted(names["ranking"].order.tolist()) == [0, 1]
    assert names["classes"].probability.sum(1).tolist() == pytest.approx([1, 1])
    assert len(names["filled"].guesses[0]) == 3
    with Image.open(folder / "rebuilt.png") as rebuilt:
        assert rebuilt.size == (32, 32)
    assert names["found"].words == ["[CLS]", "a", "red", "cat"]
    assert (folder / "words.png").stat().st_size > 0
    assert names["network"] is names["model"].network


@pytest.mark.slow
def test_commands_of_the_search_page_run(folder, capsys):
    pytest.importorskip("lancedb")
    commands = [shlex.split(line) for block in blocks("sh", "guides/search.md") for line in block.splitlines()]
    assert [words[1] for words in commands] == ["embed", *["search"] * 8]
    for words in commands:
        run_command(words[1:])
    for name in ("embedded/embedding.json", "cats.html", "cats.json"):
        assert (folder / name).stat().st_size > 0
    capsys.readouterr()
    (block,) = blocks("python", "guides/search.md")
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 3
