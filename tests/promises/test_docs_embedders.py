"""Pages on the kernels in others' models: their Python runs, and their figures are those of the result file."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
PAGES = {
    "torch": ["torch: block"],
    "timm": ["timm: patch embedding", "timm: ViT"],
    "transformers": ["transformers: BERT"],
    "diffusers": ["diffusers: block"],
}
"""Rows of the result file that a page quotes, in the page's order."""
MEASURED = json.loads((ROOT / "benchmarks/results/swapped-amd-epyc.json").read_text())
each_page = pytest.mark.parametrize("library", PAGES)


@each_page
def test_python_of_the_page_runs(library: str) -> None:
    if library != "torch":
        pytest.importorskip(library)
    found = re.findall(r"^```python\n(.*?)^```", (GUIDES / f"kernels_in_{library}.md").read_text(), re.M | re.S)
    assert len(found) == 2
    for block in found:
        exec(block, {})


@each_page
def test_times_of_the_page_are_those_of_the_result_file(library: str) -> None:
    (section,) = re.findall(r"^## Speed on a CPU\n(.*)", (GUIDES / f"kernels_in_{library}.md").read_text(), re.M | re.S)
    ratios = {row["model"]: f"{row['ratio']:.2f}" for row in MEASURED["rows"]}
    assert re.findall(r"(\d\.\d\d) times", section) == [ratios[name] for name in PAGES[library]]


def test_table_of_times_is_that_of_the_result_file() -> None:
    text = (GUIDES / "kernels_in_your_model.md").read_text()
    for row in MEASURED["rows"]:
        figures = f"{row['original_ms']:.1f} ms | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |"
        assert f"| {figures}" in text, row["model"]
    assert f"medians of {MEASURED['rounds']} rounds in turns" in " ".join(text.split())
