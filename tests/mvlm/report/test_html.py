"""The template environment: what is escaped, and what is an error."""

import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import mvlm.report
from mvlm.errors import RunError
from mvlm.report.html import figures_of, render, table
from support.pages import HOSTILE, Page

FOLDER = Path(mvlm.report.__file__).parent


def test_tables_are_plain_text():
    found = Page(table(["<a>", "b"], [["1 & 2", "<i>"], ["3", HOSTILE]]))
    assert found.rows == [["<a>", "b"], ["1 & 2", "<i>"], ["3", HOSTILE]]
    assert not found.all("i")
    assert not found.all("script")


def test_a_comparison_escapes_its_title_and_keeps_rendered_parts():
    page = render(
        "comparison.html",
        title=HOSTILE,
        last_rows=20,
        final_metrics=table([HOSTILE], []),
        evaluations=None,
        differences=None,
        charts=[],
    )
    found = Page(page)
    assert not found.all("script")
    assert not found.all("img")
    assert found.rows == [[HOSTILE]]
    assert page.count("&lt;script&gt;") == 3  # title, heading, table


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="'header' is undefined"):
        render("table.html", rows=[])


def test_every_page_carries_its_style_and_loads_nothing():
    for template in (FOLDER / "templates").glob("*.html"):
        text = template.read_text()
        assert not any(word in text for word in ("http", "<script", "<link", "url(", "| safe", "href=")), template
    css = (FOLDER / "style.css").read_text()
    assert "url(" not in css
    assert "@import" not in css


def test_figures_of_another_file_are_refused(tmp_path):
    file = tmp_path / "test.json"
    for text in ("", "[1]", "{}", "[" * 100_000):
        file.write_text(text)
        with (
            pytest.raises(RunError, match="wanted the figures that `mvlm eval retrieval` writes"),
            figures_of(file) as f,
        ):
            f["split"]
    file.write_text(json.dumps({"split": "test"}))
    with figures_of(file) as figures:
        assert figures["split"] == "test"
