"""Notebooks run from the first cell to the last, and are committed without outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.demo_folder import write_demo_folder

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((NOTEBOOKS / name).read_text())["cells"]


def run(name: str) -> dict[str, Any]:
    """Run the code cells of a notebook in one namespace, which is returned."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    return names


def test_there_are_two_notebooks_without_outputs():
    assert sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")) == ["first_steps.ipynb", "your_own_model.ipynb"]
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert json.loads(path.read_text())["nbformat"] == 4
        for cell in cells(path.name):
            assert cell["cell_type"] in ("code", "markdown")
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None


def test_links_of_notebooks_lead_somewhere():
    import re

    for path in NOTEBOOKS.glob("*.ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in cells(path.name) if cell["cell_type"] == "markdown")
        targets = re.findall(r"\]\(([^)#\s]+)\)", text)
        assert targets
        for target in targets:
            assert (NOTEBOOKS / target).exists(), target


@pytest.mark.slow
def test_first_steps_run(tmp_path, monkeypatch, capsys):
    write_demo_folder(tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = run("first_steps.ipynb")
    assert names["gallery"].shape == (8, 8)
    assert sorted(names["ranking"].order.tolist()) == list(range(8))
    assert set(names["classes"].best) <= {"heart", "animal", "vehicle"}
    assert names["rebuilt"].hidden.sum() == 8  # of 16 patches
    assert names["found"].words[0] == "[CLS]"
    assert names["features"].shape == (1, 8)


@pytest.mark.slow
def test_your_own_model_learns_to_read(capsys):
    names = run("your_own_model.ipynb")
    assert max(names["differences"]) < 1e-4
    assert names["right"] < 0.5 * names["wrong"]
