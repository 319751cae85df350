"""Tables, figures and promises in pages are those of committed results and of tests that exist."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DEMO = (ROOT / "docs/start/demo.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks/results/swapped-amd-epyc.json").read_text())


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script docs/tables.py."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.extended
def test_tables_are_those_of_the_committed_results(tables):
    found = [page for page in tables.pages() if tables.TABLE.search(page.read_text())]
    assert ROOT / "README.md" in found
    for page in found:
        assert tables.with_tables(page.read_text()) == page.read_text(), f"{page.name}: run `python docs/tables.py`"


def test_figures_beside_the_results_come_from_their_files(tables, tmp_path, monkeypatch):
    """Questions answered without the image, by trials of the study of easy-VQA."""
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    before = tables.results()
    file = tmp_path / "results/tasks/easy-vqa.jsonl"
    trials = [json.loads(line) for line in file.read_text().splitlines()]
    for trial in trials:
        trial["figures"]["test"]["accuracy"] = 12.0
    file.write_text("\n".join(map(json.dumps, trials)))
    changed = set(tables.results().splitlines()) - set(before.splitlines())
    assert [re.findall(r"alone: (\d+) %", line) for line in changed] == [["12"]]


def test_every_table_has_both_of_its_lines(tables):
    for page in tables.pages():
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end of table -->") == len(tables.TABLE.findall(text)), (
            page.name
        )


def test_times_of_swapped_models_are_those_of_the_result_file() -> None:
    page = (ROOT / "docs/guides/kernels_in_your_model.md").read_text()
    table = page.split("## Speed on a CPU")[1]
    wanted = "{original_ms:.1f} ms | {ratio:.2f} ({low:.2f} to {high:.2f})"
    assert re.findall(r"[\d.]+ ms \| .*\)", table) == [wanted.format(**row) for row in MEASURED["rows"]]


def test_each_promise_of_a_page_names_a_test() -> None:
    pages = "\n".join(page.read_text() for page in sorted(ROOT.glob("docs/**/*.md")))
    promises = re.findall(r"^\| .* \| `(tests/\S+)::(test_\w+)` \|$", pages, re.MULTILINE)
    assert len(promises) >= 20
    for file, name in promises:
        text = (ROOT / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}::{name} does not exist"


def test_notebooks_are_committed_without_outputs() -> None:
    for path in ROOT.glob("notebooks/*.ipynb"):
        notebook = json.loads(path.read_text())
        assert notebook["nbformat"] == 4
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]), path
        text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert (path.parent / target).exists(), target
