"""The comparison of runs, from folders whose numbers the tests make up."""

import json
from pathlib import Path

import pytest

from mvlm.errors import RunError
from mvlm.report.comparison import write_comparison
from support.pages import HOSTILE, Page


def made_up(folder: Path, loss: float, steps: int = 40, **settings) -> Path:
    folder.mkdir(parents=True)
    config = {"format_version": 2, "seed": 0, "batch_size": 8, "model": {"width": 16}} | settings
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": s, "loss": loss + (s <= steps - 20), "mlm": loss, "itc": None, "pairs_per_s": float(s), "bad_steps": 3}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_comparison_has_the_figures_of_each_run(tmp_path):
    runs = [made_up(tmp_path / "a", 1.5), made_up(tmp_path / "b", 2.5, 60, seed=7, model={"width": 24})]
    (runs[1] / "eval").mkdir()
    ranks = {"r1": 10.0, "r5": 20.0, "r10": 30.0}
    figures = {"split": "test", "tr": ranks, "ir": ranks, "gain_text_nats": 0.5, "gain_pixels_pct": 4.25}
    (runs[1] / "eval/test.json").write_text(json.dumps(figures))
    (runs[0] / "eval").mkdir()
    tuned = {"task": "vqa", "split": "test", "accuracy": 60.0}  # its figures have a page of their own
    (runs[0] / "eval/test.json").write_text(json.dumps(tuned))
    text = write_comparison(runs, tmp_path / "new/page.html").read_text()
    page = Page(text)
    rows = page.rows
    head = next(row for row in rows if row[:2] == ["run", "steps"])
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head) and row[0] in "ab"}
    assert (found["a"]["steps"], found["a"]["loss"], found["a"]["mlm"], found["a"]["itc"]) == ("40", "1.5", "1.5", "")
    assert (found["b"]["steps"], found["b"]["loss"], found["b"]["skipped updates"]) == ("60", "2.5", "3")
    assert (found["a"]["pairs/s"], found["b"]["pairs/s"]) == ("20.5", "30.5")
    assert ["b", "", "test", "", "ITC + ITM", "", "10.0", "20.0", "30.0", "10.0", "20.0", "30.0", "0.5", "4.25"] in rows
    differing = [row for row in rows if row[0] in ("seed", "model.width", "batch_size")]
    assert differing == [["model.width", "16", "24"], ["seed", "0", "7"]]
    assert len(page.all("svg")) == 3
    assert "http" not in text


FIGURES = {"checkpoint": "runs/a", "fingerprint": "f", "n_images": 413, "reranked": 32}


@pytest.mark.parametrize(
    "other, marked",
    [
        ({}, False),
        ({"fingerprint": "g"}, True),
        ({"n_images": 20}, True),
        ({"reranked": 0}, True),
        ({"fingerprint": None, "reranked": None}, False),  # of an earlier version
        ({"fingerprint": "g", "split": "validation"}, False),
    ],
)
def test_figures_that_differ_in_more_than_the_model_are_marked(tmp_path, other, marked):
    runs = [made_up(tmp_path / "a", 1.5), made_up(tmp_path / "b", 2.5)]
    ranks = {"r1": 10.0, "r5": 20.0, "r10": 30.0}
    common = {"split": "test", "tr": ranks, "ir": ranks, "gain_text_nats": 0.5, "gain_pixels_pct": 4.25}
    for run, changes in zip(runs, ({}, {"checkpoint": "runs/b/checkpoints/000400", **other}), strict=True):
        (run / "eval").mkdir()
        figures = {key: value for key, value in (common | FIGURES | changes).items() if value is not None}
        (run / "eval/test.json").write_text(json.dumps(figures))
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    head = next(row for row in page.rows if row[:2] == ["run", "checkpoint"])
    a, b = (dict(zip(head, row, strict=True)) for row in page.rows if len(row) == len(head) and row[0] in ("a", "b"))
    assert (a["checkpoint"], a["images"], a["re-ranked"], b["checkpoint"]) == ("a", "413", "32", "000400")
    assert ("differ in more than the model" in page.text) == marked


def test_names_and_settings_are_escaped_and_paths_tell_equal_names_apart(tmp_path):
    runs = [made_up(tmp_path / "<script>/run", 1.5), made_up(tmp_path / "b/run", 2.5, tokenizer=HOSTILE)]
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    assert not page.all("script")
    assert not page.all("img")
    assert ["tokenizer", "null", json.dumps(HOSTILE)] in page.rows
    assert all(str(run) in page.text for run in runs)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    run = made_up(tmp_path / "a", 1.0)
    empty = made_up(tmp_path / "empty", 1.0, steps=0)
    many = [made_up(tmp_path / f"many/{n}", 1.0) for n in range(7)]
    for runs, message in (
        ([run, run], "twice"),
        ([run, tmp_path / "none"], "none: "),
        ([run, empty], r"metrics\.jsonl"),
        (many, "got 7"),
    ):
        with pytest.raises(RunError, match=message):
            write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
