"""Pages of fine-tuned runs, one of each form of a task: what they show is what the evaluation says."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mvlm.errors import RunError
from mvlm.report.page import write_report
from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import finetune
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.files import write_json
from support.folders import folder_hash
from support.pages import HOSTILE, Page
from support.questions import WRITERS, finetune_config

pytestmark = pytest.mark.slow

FORMS = {
    "classifier": ("vqa", {"answers": "classifier"}),
    "entailment": ("entailment", {"eval_every_steps": 2}),
    "pairs": ("pairs", {}),
    "caption": ("caption", {"choose_by": "likelihood"}),
}


class Reported(NamedTuple):
    run: Path
    data: Path
    split: Dataset
    figures: dict[str, Any]
    """Figures of the JSON file: those of the model, on records of which some were put right by hand."""
    page: Page


@pytest.fixture(scope="module", params=FORMS)
def reported(request, trained, tmp_path_factory) -> Reported:
    """A run of two steps, evaluated and reported. Every second record is made right, so that both kinds occur."""
    from mvlm.tasks.load import find_task

    task, settings = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    data, run = WRITERS[task](folder / "data"), folder / "run <b>"
    finetune(finetune_config(trained, data, run, task, question_length=40, **settings))
    figures, records = evaluate_task(run, data, "test")
    split = open_dataset(data, "test")
    for record in records[::2]:
        i = record["sample"]
        name = "answer" if task == "vqa" else "caption" if task == "caption" else "label"
        record[name] = right_answer(task, split, i)
    figures |= find_task(task).score(records, split)
    write_json(run / "eval/test.json", {"checkpoint": HOSTILE, "data": str(data), **figures, "records": records})
    page = Page(write_report(run).read_text())
    return Reported(run, data, split, figures | {"records": records}, page)


def right_answer(task: str, split: Dataset, i: int) -> str:
    """The right answer of a sample, from its metadata."""
    record = split.metadata(i)
    if task == "vqa":
        return record["answers"][0]["answer"]
    return split.captions(i)[0] if task == "caption" else record["label"]


def predictions(found: Reported) -> list[str]:
    return [next(r[name] for name in ("answer", "label", "caption") if name in r) for r in found.figures["records"]]


def examples(found: Reported) -> dict[bool, list[str]]:
    """Keys of the right and of the wrong examples, in their order on the page."""
    html = (found.run / "report.html").read_text()
    headings = {True: r"<h2>(Right|The better half)</h2>", False: r"<h2>(Wrong|The other half)</h2>"}
    sections = {kind: re.split(heading, html)[2].split("</section>")[0] for kind, heading in headings.items()}
    return {kind: re.findall(r'<p class="note">(test\d+)</p>', text) for kind, text in sections.items()}


def test_figures_are_those_of_the_evaluation(reported):
    figures, rows = reported.figures, reported.page.rows
    main = "cider_d" if figures["task"] == "caption" else "accuracy"
    low, high = figures[f"{main}_95"]
    assert f"{figures[main]:.1f} ({low:.1f} to {high:.1f})" in [row[1] for row in rows if len(row) == 2]
    for value in (figures.get("consistency"), figures.get("bleu_1"), figures.get("mean_per_class_recall")):
        assert value is None or any(row[1:] == [f"{value:.1f}"] for row in rows)
    for kind, value in {**figures.get("by_question_type", {}), **figures.get("recall", {})}.items():
        assert [kind, f"{value:.1f}"] in rows
    for words in (f"checkpoint {HOSTILE}", "run <b>", "lr_head", "model.width", "drawn by <nobody>", "CC0"):
        assert words in reported.page.text
    assert not reported.page.all("script")


def test_right_examples_are_right_wrong_ones_wrong_and_a_hash_chooses(reported):
    task, shown, found = reported.figures["task"], examples(reported), predictions(reported)
    keys = {reported.split.keys[i]: i for i in range(len(reported.split))}
    answers = [right_answer(task, reported.split, i) for i in range(len(reported.split))]
    right = [a == b for a, b in zip(found, answers, strict=True)]
    assert 0 < sum(right) < len(right)
    for kind, some in shown.items():
        assert some
        assert all(right[keys[key]] is kind for key in some)
        ordered = sorted(some, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        assert some == ordered
        if task != "caption":
            every = sorted(
                (k for k in keys if right[keys[k]] is kind), key=lambda k: hashlib.sha256(k.encode()).digest()
            )
            assert some == every[:6]


@pytest.mark.parametrize("reported", ["entailment"], indirect=True)
def test_evaluations_that_do_not_fit_are_refused(reported, tmp_path):
    run = Path(shutil.copytree(reported.run, tmp_path / "run"))
    known = json.loads((run / "eval/test.json").read_text())
    other = [{**record, "label": "neutral"} for record in known["records"]]
    for changes, word in (
        ({"task": "pairs"}, "pairs"),
        ({"records": [{"label": "neutral"}]}, "sample"),
        ({"records": [{"sample": i} for i in range(16)]}, "label"),
        ({"records": known["records"][:-1]}, "other data"),
        ({"records": other}, "other data"),
        (None, "none"),
    ):
        (run / "eval/test.json").unlink()
        if changes is not None:
            write_json(run / "eval/test.json", known | changes)
        before = folder_hash(run)
        with pytest.raises(RunError, match=word) as error:
            write_report(run)
        assert "\n" not in str(error.value)
        assert folder_hash(run) == before
