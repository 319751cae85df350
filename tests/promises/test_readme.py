"""README: its examples run as written, and its tables are those of the committed result files."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mvlm.cli import run_command
from support.demo_folder import write_demo_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the files that README names: runs/demo and data/emoji, on a micro model, and pictures."""
    write_demo_folder(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(24):
        Image.new("RGB", (40, 40), (10 * i, 80, 255 - 10 * i)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"colour number {i}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_readme_runs(folder, capsys):
    model, kernel = blocks("python")
    exec(model, {})
    captions, filled = capsys.readouterr().out.splitlines()
    assert captions.count("'") == 6
    assert filled.endswith("of Burundi")
    assert len([line for line in model.splitlines() if line]) <= 9
    names: dict = {}
    exec(kernel, names)
    assert names["out"].shape == (8, 197, 12, 64)
    assert "CPU" in capsys.readouterr().out


@pytest.mark.slow
def test_first_commands_of_readme_run(folder):
    """The commands that make shards, a run, an evaluation and embeddings; pages on the others have tests."""
    commands = [shlex.split(line) for line in blocks("sh")[0].splitlines()]
    wanted = {"data", "pretrain", "eval", "embed"}
    chosen = [words[1:] for words in commands if words[0] == "mvlm" and words[1] in wanted]
    assert {words[0] for words in chosen} == wanted
    for words in chosen:
        run_command([*words, *(["--max-steps", "2", "--batch-size", "8"] if words[0] == "pretrain" else [])])
    assert (folder / "embedded/embedding.json").stat().st_size > 0


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script docs/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_results(tables):
    found = [page for page in tables.pages() if tables.TABLE.search(page.read_text())]
    assert ROOT / "README.md" in found
    for page in found:
        assert tables.with_tables(page.read_text()) == page.read_text(), f"{page.name}: run `python docs/tables.py`"


def test_an_edited_figure_is_found(tables):
    edited = re.sub(r"(\| chance \| )[\d.]+", r"\g<1>9.9", README)
    assert edited != README
    assert tables.with_tables(edited) == README


def test_every_table_has_both_of_its_lines(tables):
    for page in tables.pages():
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end of table -->") == len(tables.TABLE.findall(text)), (
            page.name
        )
