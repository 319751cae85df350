import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mvlm.errors import RunError
from mvlm.evaluation import evaluate
from mvlm.report.page import attribution, configuration, curves, table, unseen_note, write_report
from mvlm.runs.load import load_model
from mvlm.training.run import pretrain
from mvlm_dataloading import open_dataset
from support.folders import folder_hash
from support.models import micro_config, pretrain_config
from support.scenes import write_scenes

HOSTILE = '<script>alert("&{}")</script><img src=x>'
VOID = {"meta", "img", "br", "line", "polyline"}


class Page(HTMLParser):
    """Reads a page, and fails where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


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
        "checkpoint": str(run),
        "split": "test",
        **evaluate(*load_model(run)[:1], split, train, load_model(run)[1]),
    }
    (run / "eval").mkdir()
    (run / "eval/test.json").write_text(json.dumps(figures))
    return run, data, figures, write_report(run)


@pytest.fixture(scope="module")
def page(reported) -> Page:
    return Page(reported[3].read_text())


def test_the_page_is_whole(reported, page):
    run, _, _, file = reported
    assert file == run / "report.html"
    assert page.tags[0][0] == "html"
    assert file.read_text().startswith("<!doctype html>")
    assert [name for name in ("h1", "style", "main") if len(page.all(name)) == 1] == ["h1", "style", "main"]
    assert "run <b>" in page.text


def test_it_needs_nothing_from_elsewhere(page):
    for name in ("script", "link", "iframe", "object", "embed"):
        assert not page.all(name)
    for _, attributes in page.tags:
        assert not {"href", "srcset", "data", "background"} & set(attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    css = (Path(__file__).parents[3] / "mvlm/report/style.css").read_text()
    assert "url(" not in css
    assert "@import" not in css


def test_captions_are_escaped(reported, page):
    assert "<script" not in reported[3].read_text()
    assert 'alert("&{}")' in page.text


def test_every_picture_opens(page):
    pictures = page.all("img")
    for attributes in pictures:
        kind, _, content = (attributes["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as picture:
            picture.load()
            assert picture.size in ((32, 32), (96, 96))
        assert attributes["alt"]
    # 12 reconstructions of 4 panels, 18 filled captions with 2 pictures; the retrievals are more
    assert len(pictures) > 12 * 4 + 18 * 2


def test_the_sections(page):
    for heading in (
        "Retrieval",
        "Does each modality help the other?",
        "Training",
        "Masked pictures, rebuilt",
        "Masked captions, filled in",
        "Retrieval, best and worst",
        "Configuration",
        "Data",
    ):
        assert heading in page.text
    for words in ("original", "masked", "right picture", "wrong picture"):
        assert words in page.text or any(a.get("alt") == words for a in page.all("img"))


def test_the_curves(page):
    # four losses, the rate, the gradient norm; at evaluations R@1, masked L1 and two gains
    assert len(page.all("svg")) == 10
    assert len(page.all("polyline")) == 11
    for title in ("MLM", "MIM", "ITC", "ITM", "learning rate", "gradient norm", "validation R@1"):
        assert any(title in (svg["aria-label"] or "") for svg in page.all("svg"))


def test_the_figures_are_the_evaluations(reported, page):
    _, _, figures, _ = reported
    for way in ("tr", "ir"):
        for k in ("r1", "r5", "r10"):
            assert f"{figures[way][k]:.1f}" in page.text
    assert f"{figures['gain_text_nats']:.2f} nats a token" in page.text
    assert f"constant white {figures['masked_l1_white']:.4f}" in page.text
    assert f"{100 / 20:.2f}" in page.text  # chance of R@1 among 20 pictures
    assert "unseen concepts" not in page.text  # all colours are known


@pytest.mark.parametrize("unseen, words", [(None, ""), (10, ""), (4, "6 of 10 pictures show a concept")])
def test_unseen_concepts_are_explained_where_they_are_some(unseen, words):
    note = unseen_note({"n_images": 10, "unseen": unseen and {"n_images": unseen}})
    assert words in note
    assert bool(note) == bool(words)


def test_the_attribution_and_the_settings(page):
    for words in ("drawn by <nobody>", "CC0", "made up for tests", "model.width", "lr_encoder", "reconstruction_first"):
        assert words in page.text


def test_it_can_be_written_elsewhere_from_other_shards(reported, tmp_path):
    run, data, _, file = reported
    copy = shutil.copytree(data, tmp_path / "moved")
    out = write_report(run, copy, tmp_path / "deep/page.html")
    assert out == tmp_path / "deep/page.html"

    def strip(path: Path) -> str:
        return re.sub(r"written [\d :-]+\.", "", path.read_text())

    assert strip(out) == strip(file)  # the same pictures, again and again


def test_the_examples_are_of_the_data_that_it_was_evaluated_on(reported, tmp_path):
    run, data, figures, _ = reported
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text()) | {"data": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "eval/test.json").write_text(json.dumps(figures | {"data": str(data)}))
    assert "filled" in write_report(copy).read_text().lower()


def test_a_run_without_an_evaluation_is_told_the_command(trained):
    before = folder_hash(trained)
    with pytest.raises(RunError, match=r"test\.json: wanted the run's evaluation, found none; first run `mvlm eval"):
        write_report(trained)
    assert folder_hash(trained) == before


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"config\.json: wanted the configuration of a run"):
        write_report(tmp_path)


def test_tables_are_plain_text():
    found = Page(table(["<a>", "b"], [["1 & 2", "<i>"], ["3", "4"]]))
    assert [tag for tag, _ in found.tags].count("tr") == 3
    assert not found.all("i")
    assert "<i>" in found.text
    assert "1 & 2" in found.text


def test_curves_leave_out_what_was_not_computed():
    """While reconstruction runs alone, ITC and ITM are null."""
    rows = [
        {"step": s, "mlm": 1.0, "mim": 1.0, "itc": None, "itm": None if s < 3 else 0.5, "lr": 0.1, "grad_norm": 1.0}
        for s in (1, 2, 3, 4)
    ]
    found = Page(curves(rows))
    points = {
        svg["aria-label"]: line["points"] for svg, line in zip(found.all("svg"), found.all("polyline"), strict=True)
    }
    assert "ITC, nats" not in points
    assert "no points" in found.text
    assert len((points["ITM, nats"] or "").split()) == 2
    assert len((points["MLM, nats a masked token"] or "").split()) == 4


def test_the_configuration_and_the_attribution_are_escaped():
    page = Page(
        configuration({"data": HOSTILE, "model": {"width": 3}}) + attribution({"source": HOSTILE, "licence": ""})
    )
    assert not page.all("script")
    assert page.text.count("alert(") == 2
    assert "licence" not in page.text
