"""The report of a small run whose captions, names and data would break a careless page."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mvlm.errors import RunError
from mvlm.report import figures
from mvlm.report.page import write_report
from mvlm.tasks.load import load_model
from mvlm.training.run import pretrain
from mvlm_dataloading import open_dataset
from support.folders import folder_hash
from support.models import micro_config, pretrain_config
from support.pages import HOSTILE, Page
from support.scenes import write_scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run of two steps on captions that would break a careless page, evaluated and reported."""
    folder = tmp_path_factory.mktemp("reported")
    data = write_scenes(
        folder / "data",
        {"train": 24, "validation": 8, "test": 20},
        captions=lambda i: [f"{HOSTILE[:8]}{i}{HOSTILE[8:]}", f"scene {i} & more"],
    )
    run = folder / "run <b>"
    model = micro_config(text_length=40, vocab_size=400)
    pretrain(pretrain_config(data, run, eval_every_steps=1, model=model))
    split, train = open_dataset(data, "test"), open_dataset(data, "train")
    figures = {
        "checkpoint": HOSTILE,
        "split": "test",
        "fingerprint": split.fingerprint,
        **load_model(run).evaluate(split, train).figures,
    }
    (run / "eval").mkdir()
    (run / "eval/test.json").write_text(json.dumps(figures))
    return run, data, figures, write_report(run)


@pytest.fixture(scope="module")
def page(reported) -> Page:
    return Page(reported[3].read_text())


def test_a_report_needs_nothing_from_elsewhere_and_escapes_others_words(reported, page):
    run, _, _, file = reported
    text = file.read_text()
    assert file == run / "report.html"
    assert text.startswith("<!doctype html>")
    assert [name for name in ("h1", "style", "main") if len(page.all(name)) == 1] == ["h1", "style", "main"]
    for name in ("script", "link", "iframe", "object", "embed"):
        assert not page.all(name)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "data", "background"} & set(attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "<script" not in text
    for words in ("run <b>", 'alert("&{}")', f"checkpoint {HOSTILE}"):
        assert words in page.text
    assert any("<script>" in (attributes["alt"] or "") for attributes in page.all("img"))


def test_a_report_has_the_figures_charts_settings_and_data_of_the_run(reported, page):
    _, _, figures, _ = reported
    head = next(place for place, row in enumerate(page.rows) if row[:1] == ["queries"])
    recalls = dict(zip(page.rows[head], page.rows[head + 1], strict=True))
    for way, direction in (("tr", "image to text"), ("ir", "text to image")):
        for k in (1, 5, 10):
            assert recalls[f"{direction} R@{k}"] == f"{figures[way][f'r{k}']:.1f}"
    assert f"{figures['gain_text_nats']:.2f} nats per token" in page.text
    assert f"{figures['gain_mim_pct']:.2f} % (95 %: " in page.text
    # four losses, the rate, the gradient norm; at evaluations R@1, masked L1 and two gains
    assert len(page.all("svg")) == 10
    for words in ("drawn by <nobody>", "CC0", "made up for tests", "model.width", "lr_encoder", "warmup_steps"):
        assert words in page.text


def test_a_report_can_lie_elsewhere_and_use_the_data_of_the_evaluation(reported, tmp_path):
    """With the same examples each time."""
    run, data, figures, file = reported

    def strip(path: Path) -> str:
        return re.sub(r"written [\d :-]+\.", "", path.read_text())

    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    out = write_report(run, moved, tmp_path / "deep/page.html")
    assert out == tmp_path / "deep/page.html"
    assert strip(out) == strip(file)
    copy = shutil.copytree(run, tmp_path / "run <b>")
    config = json.loads((copy / "config.json").read_text()) | {"data": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "eval/test.json").write_text(json.dumps(figures | {"data": str(moved)}))
    assert Page(write_report(copy).read_text()).all("img") == Page(file.read_text()).all("img")


def test_a_report_says_which_figures_are_of_other_weights(reported, page, tmp_path):
    run, _, figures, _ = reported
    assert "are not of the model" not in page.text  # figures of an earlier version name no model
    copy = shutil.copytree(run, tmp_path / "run")
    for sha256, other in ((load_model(run, "cpu").sha256, False), ("0" * 64, True)):
        (copy / "eval/test.json").write_text(json.dumps(figures | {"model": sha256}))
        found = Page(write_report(copy).read_text())
        assert ("The figures of the next two sections are not of the model" in found.text) == other


def test_runs_that_cannot_be_reported_are_refused(reported, trained, tmp_path):
    run = Path(shutil.copytree(reported[0], tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    for folder, file in ((trained, "test.json"), (run, "metrics.jsonl"), (tmp_path / "empty", "config.json")):
        before = folder_hash(folder)
        with pytest.raises(RunError, match=re.escape(file)):
            write_report(folder)
        assert folder_hash(folder) == before


def test_a_report_says_what_a_run_forgot():
    rows = [{"also_before_tr_r1": 50.0, "also_before_ir_r1": 40.0}, {"loss": 1.0}]
    last = {"also_after_tr_r1": 37.5, "also_after_ir_r1": 26.04}
    config = {"also_evaluate": "data/old"}
    assert figures.forgetting(config, rows[1:]) == []
    (note,) = figures.forgetting(config, [*rows, last])
    assert "data/old" in note
    assert "50.0 and 40.0 % before training, 37.5 and 26.0 % after training" in note
    assert "after" not in figures.forgetting(config, rows)[0]


def test_a_run_of_others_shows_no_other_data(reported, scenes, tmp_path):
    """Figures of others name any folder or URL. Data that are not those of the figures have to be named by the user."""
    run, data, figures, _ = reported
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for place in (str(scenes), "http://127.0.0.1:1/data"):
        (copy / "eval/test.json").write_text(json.dumps(figures | {"data": place}))
        with pytest.raises(RunError, match="--data"):
            write_report(copy)
    assert write_report(copy, data).is_file()
