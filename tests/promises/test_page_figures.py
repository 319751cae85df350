"""Tables, figures and promises in pages are those of committed results and of tests that exist."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDES = ROOT / "docs" / "guides"
PAGES = {
    "torch": ["torch: block"],
    "timm": ["timm: patch embedding", "timm: ViT"],
    "transformers": ["transformers: BERT"],
}
"""Rows of the result file that a page quotes, in the page's order."""
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


def test_every_table_has_both_of_its_lines(tables):
    for page in tables.pages():
        text = page.read_text()
        assert text.count("<!-- table:") == text.count("<!-- end of table -->") == len(tables.TABLE.findall(text)), (
            page.name
        )


@pytest.mark.parametrize("library", PAGES)
def test_times_of_the_page_are_those_of_the_result_file(library: str) -> None:
    (section,) = re.findall(r"^## Speed on a CPU\n(.*)", (GUIDES / f"kernels_in_{library}.md").read_text(), re.M | re.S)
    ratios = {row["model"]: f"{row['ratio']:.2f}" for row in MEASURED["rows"]}
    assert re.findall(r"(\d\.\d\d) times", section) == [ratios[name] for name in PAGES[library]]


def test_table_of_proofs_has_exactly_the_kernels_that_are_compiled_ahead_of_time() -> None:
    page = (ROOT / "docs/guides/prove_your_kernel.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|(?: (?:✓|no case|none) \|){5}$", page, re.MULTILINE)
    compiled = json.loads((ROOT / "benchmarks/results/aot-3.9.json").read_text())["rows"]
    assert sorted(table) == sorted({row["kernel"] for row in compiled})


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
