"""Commands and examples of docs/ run as written, in order. Only pretraining is shortened.

docs/guides/data.md and docs/explain/loader.md are run by test_docs_data.py and test_docs_loader.py.
"""

import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import mvlm_dataloading
from mvlm.cli import run_command
from mvlm_dataloading import open_dataset
from support.shapes import copy_shapes

ROOT = Path(__file__).parents[2]
GUIDE, TRAINING = ROOT / "docs" / "start" / "first_run.md", ROOT / "docs" / "guides" / "training.md"
SHORT = ["--max-steps", "2", "--batch-size", "8"]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of the guide ran, in this process to save imports.

    `mvlm data emoji` draws 300 of the emoji. After it the committed images replace them, whose evaluation takes a
    minute. `.ci/run` runs the demo on all emoji.
    """
    folder = tmp_path_factory.mktemp("guide")
    Image.new("RGB", (80, 60), "red").save(folder / "image.png")
    commands = [shlex.split(line) for block in blocks("sh", GUIDE) for line in block.splitlines()]
    assert len(commands) >= 7
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        some = partial(mvlm_dataloading.build_emoji, limit=300)
        patch.setattr(mvlm_dataloading, "build_emoji", some, raising=False)
        for name, *words in commands:
            assert name == "mvlm"
            run_command([*words, *(SHORT if words[0] == "pretrain" else [])])
            if words[:2] == ["data", "emoji"]:
                assert sum(len(open_dataset(words[2], split)) for split in ("train", "validation", "test")) == 300
                shutil.rmtree(words[2])
                copy_shapes(Path(words[2]))
    return folder


@pytest.mark.slow
def test_commands_of_the_guide_run(guide_folder: Path) -> None:
    for name in ("data/emoji/dataset.json", "runs/guide/eval/test.json", "runs/guide/report.html", "rebuilt.png"):
        assert (guide_folder / name).stat().st_size > 0
    with Image.open(guide_folder / "rebuilt.png") as rebuilt:
        assert rebuilt.size == (4 * 64, 64)


@pytest.mark.slow
def test_python_of_the_guide_runs(guide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(guide_folder)
    for block in blocks("python", GUIDE):
        names: dict[str, object] = {}
        exec(block, names)
        assert names["model"].network.training is False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/explain/kernels/*.md")), ids=lambda page: page.stem)
def test_examples_of_the_ops_run(page: Path) -> None:
    assert blocks("python", page)
    for block in blocks("python", page):
        exec(block, {})


@pytest.mark.slow
def test_commands_of_the_training_page_run(tmp_path, monkeypatch, capsys) -> None:
    """They run in one process, on the committed images in place of the emoji that the guide's commands build."""
    monkeypatch.chdir(tmp_path)
    copy_shapes(tmp_path / "data" / "emoji")
    commands = [shlex.split(line) for block in blocks("sh", TRAINING) for line in block.splitlines()]
    assert [words[1] for words in commands] == [
        "data", "doctor", "pretrain", "pretrain", "pretrain", "report", "export",
    ]  # fmt: skip
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


def test_each_promise_of_a_page_names_a_test() -> None:
    pages = "\n".join(page.read_text() for page in sorted(ROOT.glob("docs/**/*.md")))
    promises = re.findall(r"^\| .* \| `(tests/\S+)::(test_\w+)` \|$", pages, re.MULTILINE)
    assert len(promises) >= 20
    for file, name in promises:
        text = (ROOT / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}::{name} does not exist"
