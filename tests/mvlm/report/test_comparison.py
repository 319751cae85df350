"""The comparison of runs, from folders whose numbers the tests make up."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.errors import RunError
from mvlm.report.comparison import write_comparison


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


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_what_is_told_of_each_run(tmp_path):
    runs = [made_up(tmp_path / "a", 1.5), made_up(tmp_path / "b", 2.5, 60, seed=7, model={"width": 24})]
    (runs[1] / "eval").mkdir()
    ranks = {"r1": 10.0, "r5": 20.0, "r10": 30.0}
    figures = {"split": "test", "tr": ranks, "ir": ranks, "gain_text_nats": 0.5, "gain_pixels_pct": 4.25}
    (runs[1] / "eval/test.json").write_text(json.dumps(figures))
    page = write_comparison(runs, tmp_path / "new/page.html").read_text()
    rows = cells(page)
    head = next(row for row in rows if row[:2] == ["run", "steps"])
    told = {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head) and row[0] in "ab"}
    assert (told["a"]["steps"], told["a"]["loss"], told["a"]["mlm"], told["a"]["itc"]) == ("40", "1.5", "1.5", "")
    assert (told["b"]["steps"], told["b"]["loss"], told["b"]["bad steps"]) == ("60", "2.5", "3")
    assert (told["a"]["pairs/s"], told["b"]["pairs/s"]) == ("20.5", "30.5")
    assert ["b", "test", "10.0", "20.0", "30.0", "10.0", "20.0", "30.0", "0.5", "4.25"] in rows
    differing = [row for row in rows if row[0] in ("seed", "model.width", "batch_size")]
    assert differing == [["model.width", "16", "24"], ["seed", "0", "7"]]
    for svg in re.findall(r"<svg.*?</svg>", page):
        lines = ET.fromstring(svg).findall("polyline")
        assert [line.get("class") for line in lines] == ["line0", "line1"]
    assert len(re.findall("<svg", page)) == 3  # loss, MLM, pairs/s: what there is
    assert "http" not in page.replace("http://www.w3.org", "")


def test_equal_names_are_told_apart(tmp_path):
    runs = [made_up(tmp_path / "x/run", 1.0), made_up(tmp_path / "<y>/run", 2.0)]
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert f"{tmp_path}/x/run" in page
    assert f"{tmp_path}/&lt;y&gt;/run" in page
    assert "<y>" not in page


def test_what_cannot_be_compared(tmp_path):
    run = made_up(tmp_path / "a", 1.0)
    empty = made_up(tmp_path / "empty", 1.0, steps=0)
    many = [made_up(tmp_path / f"many/{n}", 1.0) for n in range(7)]
    for runs, message in (
        ([run, run], "wanted different runs, got one twice"),
        ([run, tmp_path / "none"], "none: wanted a run folder, found no such folder"),
        ([run, empty], "metrics.jsonl: wanted the metrics of a run, found none"),
        (many, "wanted 2 to 6 runs to compare, got 7"),
    ):
        with pytest.raises(RunError, match=message):
            write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command(tmp_path, capsys):
    runs = [made_up(tmp_path / name, 1.0) for name in "abc"]
    cli.run_command(["report", *map(str, runs)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a/compare.html")
    assert "<h1>a · b · c</h1>" in (tmp_path / "a/compare.html").read_text()
