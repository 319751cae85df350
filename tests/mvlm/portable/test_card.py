"""Model cards: what they state is the run's, and other people's text stays text."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import RunError
from mvlm.portable.hub import line, model_card, recalls
from mvlm.tasks.load import load_model
from mvlm_dataloading import open_dataset

RECALL = {"r1": 25.0, "r5": 62.5, "r10": 100.0}
PRETRAINING_ALONE = PretrainConfig.__dataclass_fields__.keys() - FinetuneConfig.__dataclass_fields__.keys()


@pytest.fixture
def figures(scenes) -> dict[str, Any]:
    """Figures of an evaluation, but for the hash of its model."""
    return {
        "checkpoint": "/home/someone/run",
        "split": "test",
        "fingerprint": open_dataset(scenes, "test").fingerprint,
        "n_images": 8,
        "n_texts": 12,
        "tr": RECALL,
        "ir": {"r1": 50.0, "r5": 75.0, "r10": 91.67},
        "tr_95": {"r1": [0.0, 50.0], "r5": [25.0, 87.5], "r10": [100.0, 100.0]},
        "ir_95": {"r1": [25.0, 75.0], "r5": [50.0, 100.0], "r10": [75.0, 100.0]},
        "itc": {"tr": RECALL, "ir": RECALL},
        "unseen": None,
        "gain_text_nats": 0.25,
        "gain_text_nats_95": [0.125, 0.375],
        "gain_pixels_pct": 1.5,
        "gain_pixels_pct_95": [1.25, 1.75],
        "masked_l1": 0.31,
        "masked_l1_white": 0.9,
        "masked_l1_train_median": 0.5,
    }


def card_of(run: Path, figures: Any = None, *, without: Collection[str] = (), **settings: Any) -> str:
    """The card of a run whose settings are changed, and which has these figures, of its own model if they name none."""
    file = run / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name not in without}
    file.write_text(json.dumps(config | settings))
    model = load_model(run, "cpu")
    if figures is not None:
        (run / "eval").mkdir(exist_ok=True)
        named = {"model": model.sha256} | figures if isinstance(figures, dict) else figures
        (run / "eval/test.json").write_text(json.dumps(named))
    return model_card(run, model.network, model.sha256, hub_id="someone/demo")


def head_of(card: str) -> dict[str, Any]:
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head)


def metrics_of(card: str) -> list[dict[str, Any]]:
    """Metrics that the hub shows of a card."""
    (model,) = head_of(card)["model-index"]
    return [metric for result in model["results"] for metric in result["metrics"]]


@pytest.mark.slow
def test_a_card_states_figures_with_intervals_data_recipe_and_limits(run_copy, figures):
    gains = {
        "gain_mim_pct": 6.25,
        "gain_mim_pct_95": [5.5, 7],
        "gain_untrained_pct": 0.5,
        "gain_untrained_pct_95": [0, 1],
    }
    card = card_of(run_copy, figures | gains)
    for said in (
        "| cross-modal gain, MIM | 6.25 % (95 %: 5.50 to 7.00) | untrained pixel head 0.50 % (95 %: ",
        "| all (8) | image to text | ITC, re-ranked by ITM | 1 | 25.0 | 0.0 to 50.0 | 12.50 |",
        "| cross-modal gain, text, nats per token | 0.250 | 0.125 to 0.375 |",
        "| licence | CC0 |",
        r"| attribution | drawn by \<nobody\> |",
        "- train: 32 images, 48 captions",
        "Step 2, 16 pairs seen (0.5 epochs)",
        '| optimizer | "adamw" |',
    ):
        assert said in card
    for unsaid in ("lr_muon", "/home"):  # AdamW does not read the rate of Muon
        assert unsaid not in card
    assert {metric["type"] for metric in metrics_of(card)} == {"recall@1", "recall@5", "recall@10"}
    assert len(recalls(figures)) == 12
    assert "| lr_muon | 0.03 |" in card_of(run_copy, optimizer="muon", lr_muon=0.03)


@pytest.mark.slow
def test_the_card_of_a_model_without_itm_does_not_claim_it(without_itm, tmp_path, figures):
    """Neither in words nor in what the hub reads: a re-ranked figure there is one of ITC."""
    card = card_of(Path(shutil.copytree(without_itm, tmp_path / "run")), figures | {"reranked": 0})
    assert "model.match" not in card
    assert "re-ranked" not in card
    names = {result["name"] for result in metrics_of(card)}
    assert names == {f"{d}, ITC, recall@{k}" for d in ("image to text", "text to image") for k in (1, 5, 10)}


def test_the_card_of_a_fine_tuned_run_states_its_task_and_its_start(run_copy, figures):
    """The card's figures are not zero-shot, the data before it are not its own, and its recipe is what it read."""
    read = {"task": "retrieval", "lr_head": 0.02, "train_text": "frozen"}
    start = "/home/someone/runs/my_demo/checkpoints/step_00000002"
    card = card_of(run_copy, figures, without=PRETRAINING_ALONE, checkpoint=start, **read)
    for said in (
        r"fine-tuned by `mvlm finetune retrieval` from the model my\_demo.",
        r"The data behind the model my\_demo, and their licences, are not listed here",
        *(f"| {name} | {json.dumps(value)} |" for name, value in read.items()),
    ):
        assert said in card
    for unsaid in ("mvlm pretrain", "Zero-shot", "model-index", "/home", "| mlm_weight |", "| optimizer |"):
        assert unsaid not in card


@pytest.mark.slow
def test_figures_are_stated_of_this_model_and_its_data_alone(run_copy, figures):
    first = load_model(run_copy / "checkpoints/step_00000001", "cpu")
    tuned = {"task": "vqa", "split": "test", "checkpoint": "runs/demo", "accuracy": 60.0, "records": []}
    for changed, why in (
        (None, "The run has not been evaluated"),
        (figures, ""),
        (figures | {"model": first.sha256}, "of another checkpoint"),
        (figures | {"fingerprint": "of other data"}, "of other data than the model was trained on"),
        (figures | {"split": "no_split"}, "of other data than the model was trained on"),
        (tuned, "of a task, so there are no figures of retrieval"),
    ):
        card = card_of(run_copy, changed)
        assert ("| image to text |" in card) == (not why)
        assert why in card
        assert ("How well it works is not known" in card) == bool(why)
        assert ("model-index" in card) == (not why)
    card_of(run_copy, figures | {"model": first.sha256})
    card = model_card(run_copy / "checkpoints/step_00000001", first.network, first.sha256)
    assert "| image to text |" in card
    assert "Step 1, 8 pairs seen" in card


@pytest.mark.slow
def test_a_damaged_evaluation_is_refused(run_copy, figures):
    for content in (
        [1], "text", {}, figures | {"tr": {}}, figures | {"tr_95": None}, figures | {"gain_text_nats_95": [1]},
        figures | {"gain_mim_pct": 1.5},
        figures | {"masked_l1": "low"}, {name: value for name, value in figures.items() if name != "masked_l1_white"},
        {name: value for name, value in figures.items() if name != "split"},
    ):  # fmt: skip
        with pytest.raises(RunError, match=r"test.json: wanted the figures that `mvlm eval retrieval` writes, got"):
            card_of(run_copy, content)


def test_text_of_others_cannot_format():
    assert line("a | b\n\n# c <script>[x](y)") == r"a \| b \# c \<script\>\[x\](y)"
    assert line("CC BY-SA 4.0 (https://a.org)") == "CC BY-SA 4.0 (https://a.org)"
