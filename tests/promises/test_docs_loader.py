"""The code of the pages on the loader runs as written."""

import re
from pathlib import Path

import pytest

from support.data import write_waves

ROOT = Path(__file__).parents[2]
PAGE = "".join((ROOT / "docs" / folder / "loader.md").read_text() for folder in ("explain", "evidence"))
# Its commands take minutes; other tests run them on less data.
ELSEWHERE = {
    "python tests/promises/faults/kill_loaders.py data/emoji --kills 50",  # test_killed_loaders
    "mvlm bench data --data data/photos",  # tests/benchmarks/data/test_run.py, both
    "mvlm bench data --data data/photos --soak 200000 --start 1000000 --step step.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    write_waves(folder / "data" / "emoji")
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_of_the_loader_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert len(blocks("python")) == 1
    exec(blocks("python")[0], {})
    assert "same samples in the same order, same pixels, captions and masks" in capsys.readouterr().out


def test_commands_of_the_loader_page_are_run_by_other_tests():
    assert {line for block in blocks("sh") for line in block.splitlines()} == ELSEWHERE
