"""Every command in docs/guide.md runs, in order, as written, but for the length of the pretraining; so does every
example of an op.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
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
