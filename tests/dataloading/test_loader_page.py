"""What docs/loader.md shows runs as written; its commands run on less."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "loader.md").read_text()
# A command's words, and what makes it short.
SHORT = {
    "python tests/dataloading/loading_faults.py data/emoji --kills 50": None,  # test_loading_faults runs it
    "mvlm bench data --data data/photos": None,  # tests/benchmarks/test_data.py runs both
    "mvlm bench data --data data/photos --soak 200000 --start 1000000 --step step.json": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, waves) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    (folder / "data" / "emoji").symlink_to(waves)
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_python(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert len(blocks("python")) == 1
    exec(blocks("python")[0], {})
    assert "the same samples in the same order, and the same pixels, captions and masks" in capsys.readouterr().out


def test_commands(folder):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert set(lines) == set(SHORT)
    for line, more in SHORT.items():
        if more is not None:
            command = [sys.executable, *shlex.split(line)[1:], *more]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
