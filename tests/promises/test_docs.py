"""Every command in docs/guide.md runs, in order, as written, but for the length of the pretraining; so does every
example of an op.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
SHORT = ["--max-steps", "2", "--batch-size", "8"]


def blocks(language: str, page: Path = GUIDE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    Image.new("RGB", (80, 60), "red").save(folder / "picture.png")
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 7
    for words in commands:
        assert words[0] == "mvlm"
        words = [*words[1:], *(SHORT if words[1] == "pretrain" else [])]
        done = subprocess.run([sys.executable, "-m", "mvlm", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"mvlm {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return folder


def test_commands_leave_what_the_guide_says(guide_folder: Path) -> None:
    for name in ("data/emoji/dataset.json", "runs/guide/eval/test.json", "runs/guide/report.html", "rebuilt.png"):
        assert (guide_folder / name).stat().st_size > 0
    with Image.open(guide_folder / "rebuilt.png") as rebuilt:
        assert rebuilt.size == (4 * 96, 96)


def test_python_blocks_run(guide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(guide_folder)
    for block in blocks("python"):
        names: dict[str, object] = {}
        exec(block, names)
        assert names["model"].training is False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", sorted(GUIDE.parent.glob("kernels/*.md")), ids=lambda page: page.stem)
def test_examples_of_the_ops_run(page: Path) -> None:
    assert blocks("python", page)
    for block in blocks("python", page):
        exec(block, {})


def test_links_between_pages_lead_somewhere() -> None:
    root = GUIDE.parents[1]
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"


TRAINING = GUIDE.with_name("training.md")


def test_commands_of_the_training_page_run(tmp_path, monkeypatch, capsys) -> None:
    """In one process, on the committed pictures in place of the emoji that the guide's commands build."""
    from mvlm.cli import run_command

    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(Path(__file__).parent / "faults" / "data", tmp_path / "data" / "emoji")
    for index in data.glob("*.idx"):
        os.utime(index)
    commands = [shlex.split(line) for block in blocks("sh", TRAINING) for line in block.splitlines()]
    assert [words[1] for words in commands] == [
        "data",
        "doctor",
        "pretrain",
        "pretrain",
        "pretrain",
        "report",
        "export",
    ]
    for words in commands[1:]:
        short = SHORT if words[1] == "pretrain" else SHORT[2:] if words[1] == "doctor" else []
        run_command([*words[1:], *short])
    for name in (
        "runs/mine/compare.html",
        "runs/mine/metrics.jsonl",
        "runs/again/metrics.jsonl",
        "portable/model.safetensors",
    ):
        assert (tmp_path / name).stat().st_size > 0


def test_each_promise_names_a_test_that_there_is() -> None:
    promises = re.findall(r"^\| .* \| `(tests/\S+)::(test_\w+)` \|$", TRAINING.read_text(), re.MULTILINE)
    assert len(promises) >= 20
    for file, name in promises:
        text = (GUIDE.parents[1] / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}::{name} is not there"
