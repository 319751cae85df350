"""Model cards: what they state is the run's, and other people's text stays text."""

import json
import shutil

import pytest
import yaml

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import RunError
from mvlm.portable.hub import line, model_card, origin, recalls
from mvlm.runs.load import load_model
from mvlm_dataloading import open_dataset

RECALL = {"r1": 25.0, "r5": 62.5, "r10": 100.0}
FIGURES = {
    "checkpoint": "/home/someone/run",
    "split": "test",
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


def head_of(card: str) -> dict:
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head)


def test_the_card_of_a_run_with_muon_has_its_rate(run_copy):
    config = json.loads((run_copy / "config.json").read_text()) | {"optimizer": "muon", "lr_muon": 0.03}
    (run_copy / "config.json").write_text(json.dumps(config))
    card = model_card(run_copy, load_model(run_copy, "cpu").network, hub_id="someone/demo")
    assert '| optimizer | "muon" |' in card
    assert "| lr_muon | 0.03 |" in card


def test_the_card_of_a_model_without_itm_does_not_claim_it(without_itm, tmp_path):
    """Neither in words nor in what the hub reads: a re-ranked figure there is one of ITC."""
    run = shutil.copytree(without_itm, tmp_path / "run")
    (run / "eval").mkdir()
    (run / "eval/test.json").write_text(json.dumps(FIGURES | {"reranked": 0}))
    card = model_card(run, load_model(run, "cpu").network, hub_id="someone/demo")
    first = "It compares images with texts, fills in masked words and rebuilds masked patches of images."
    assert first in " ".join(card.split())
    assert "model.match" not in card
    assert "re-ranked" not in card
    assert "`match`, `rerank` and `attention` read a head with random weights" in card
    assert "| itm_weight | 0.0 |" in card
    assert "| all (8) | image to text | ITC | 1 | 25.0 | 0.0 to 50.0 | 12.50 |" in card
    names = {result["name"] for result in metrics_of(card)}
    assert names == {f"{d}, ITC, recall@{k}" for d in ("image to text", "text to image") for k in (1, 5, 10)}


def metrics_of(card: str) -> list[dict]:
    """What the hub shows of a card."""
    (model,) = head_of(card)["model-index"]
    return [metric for result in model["results"] for metric in result["metrics"]]


@pytest.mark.parametrize(
    "path, name",
    [
        ("/home/x/my_run/checkpoints/step_00000002", r"my\_run"),
        ("/home/x/folder/model.safetensors", "folder"),
        ("/home/x/my_run", r"my\_run"),
    ],
)
def test_a_start_is_named_by_its_run_or_folder(path, name):
    assert origin({"initial_model": path}) == f"the model {name}"


def test_a_start_that_was_given_from_within_its_run_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert origin({"checkpoint": "checkpoints/step_00000002"}) == f"the model {line(tmp_path.name)}"


def test_the_card_of_a_fine_tuned_run_states_its_task_and_what_it_started_from(run_copy):
    """Its figures are not zero-shot, and the data before it are not its own."""
    config = json.loads((run_copy / "config.json").read_text())
    changed = {"task": "retrieval", "checkpoint": "/home/someone/runs/my_demo/checkpoints/step_00000002"}
    (run_copy / "config.json").write_text(json.dumps(config | changed))
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text(json.dumps(FIGURES))
    card = model_card(run_copy, load_model(run_copy, "cpu").network, hub_id="someone/demo")
    assert r"fine-tuned by `mvlm finetune retrieval` from the model my\_demo." in card
    assert "without the head of the task. It compares images" in card
    assert "mvlm pretrain" not in card
    assert r"The data behind the model my\_demo, and their licences, are not listed here" in card
    assert "Step 2, 16 samples seen in this run (0.5 epochs)" in card
    assert "Retrieval on the test split" in card
    assert "zero-shot-retrieval" not in card
    assert "Zero-shot" not in card
    assert "model-index" not in head_of(card)
    assert '| task | "retrieval" |' in card
    assert "/home" not in card


PRETRAINING_ALONE = PretrainConfig.__dataclass_fields__.keys() - FinetuneConfig.__dataclass_fields__.keys()


def tuned(run_copy, **settings) -> str:
    """The card of a run whose settings say that it was fine-tuned."""
    config = json.loads((run_copy / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in PRETRAINING_ALONE}
    (run_copy / "config.json").write_text(json.dumps(config | {"checkpoint": "/home/someone/first"} | settings))
    return model_card(run_copy, load_model(run_copy, "cpu").network, hub_id="someone/demo")


@pytest.mark.parametrize(
    ("settings", "able"),
    [
        ({"task": "retrieval"}, "compares images with texts and judges whether an image and a text belong together."),
        ({"task": "caption"}, "fills in masked words."),
        ({"task": "vqa", "answers": "masked"}, "fills in masked words."),
        ({"task": "vqa", "answers": "classifier"}, "was trained for that task alone."),
        ({"task": "retrieval", "freeze": "all"}, "was trained for that task alone."),
    ],
)
def test_the_card_of_a_run_from_random_weights_claims_what_its_task_trains(run_copy, settings, able):
    card = tuned(run_copy, random_weights=True, **settings)
    assert f"trained by `mvlm finetune {settings['task']}` from random weights." in card
    assert f"without the head of the task. It {able}\n" in card
    assert "the model first" not in card
    assert "What the task does not train has random weights" in card
    assert "fine-tuned" not in card
    assert "Fine-tuning" not in card
    assert ("model.similarity" in card) == able.startswith("compares")
    assert "| random_weights | true |" in card


def test_the_recipe_of_a_fine_tuned_run_lists_what_it_read(run_copy):
    read = {"lr_head": 0.02, "random_weights": False, "blind": "image", "freeze": "encoders"}
    card = tuned(run_copy, task="retrieval", **read)
    for name, value in read.items():
        assert f"| {name} | {json.dumps(value)} |" in card
    for name in ("mlm_weight", "mim_weight", "itc_weight", "itm_weight", "lr_pixels", "optimizer", "initial_model"):
        assert f"| {name} |" not in card


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initial_model": "/home/someone/runs/first"}, "the model first"),
        ({"image_weights": "vit", "text_weights": "a/bert"}, "the image weights vit and the text weights bert"),
    ],
)
def test_the_card_of_a_continued_run_says_from_what(run_copy, settings, words):
    config = json.loads((run_copy / "config.json").read_text())
    (run_copy / "config.json").write_text(json.dumps(config | settings))
    card = model_card(run_copy, load_model(run_copy, "cpu").network, hub_id="someone/demo")
    assert f"pretrained by `mvlm pretrain` from {words}. It compares images" in card
    assert f"The data behind {words}, and their licences, are not listed here" in card
    assert "Step 2, 16 pairs seen in this run" in card
    assert "without the head" not in card


def test_a_card_states_figures_with_intervals_data_recipe_and_limits(run_copy):
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text(json.dumps(FIGURES))
    card = model_card(run_copy, load_model(run_copy, "cpu").network, hub_id="someone/demo")
    assert "| all (8) | image to text | ITC, re-ranked by ITM | 1 | 25.0 | 0.0 to 50.0 | 12.50 |" in card
    assert "| all (12) | text to image | ITC, re-ranked by ITM | 10 | 91.7 | 75.0 to 100.0 | 100.00 |" in card
    assert "| all (8) | image to text | ITC | 1 | 25.0 |  | 12.50 |" in card
    assert "| cross-modal gain, text, nats per token | 0.250 | 0.125 to 0.375 |" in card
    assert "constant white 0.9000, training median 0.5000" in card
    assert "| licence | CC0 |" in card
    assert r"| attribution | drawn by \<nobody\> |" in card
    assert "- train: 32 images, 48 captions" in card
    assert "Step 2, 16 pairs seen (0.5 epochs)" in card
    assert "| batch_size | 8 |" in card
    assert '| optimizer | "adamw" |' in card
    assert "lr_muon" not in card  # which AdamW does not read
    assert "It knows what 32 training images" in card
    assert "The data name no concepts" in card
    assert "/home" not in card
    assert "pretrained by `mvlm pretrain`. It compares images" in card
    assert "not listed here" not in card
    assert "Zero-shot retrieval on the test split" in card
    results = head_of(card)["model-index"][0]["results"]
    assert {metric["type"] for result in results for metric in result["metrics"]} == {
        "recall@1",
        "recall@5",
        "recall@10",
    }
    assert len(recalls(FIGURES)) == 12


def test_a_run_without_an_evaluation_says_so(trained):
    card = model_card(trained / "checkpoints/step_00000001", load_model(trained, "cpu").network)
    assert "The run has not been evaluated" in card
    assert "How well it works is not known" in card
    assert "Step 1, 8 pairs seen" in card
    assert "model-index" not in head_of(card)


def test_figures_of_another_checkpoint_are_not_taken(run_copy):
    network = load_model(run_copy, "cpu").network
    (run_copy / "eval").mkdir()
    first, newest = run_copy / "checkpoints/step_00000001", run_copy / "checkpoints/step_00000002"
    for evaluated, source, taken in (
        ("runs/demo", run_copy, True),
        ("runs/demo", newest, True),
        ("runs/demo", first, False),
        ("runs/demo/checkpoints/step_00000001", first, True),
        ("runs/demo/checkpoints/step_00000001", run_copy, False),
    ):
        (run_copy / "eval/test.json").write_text(json.dumps(FIGURES | {"checkpoint": evaluated}))
        card = model_card(source, network)
        assert ("| image to text |" in card) == taken
        assert ("The run's evaluation is of another checkpoint" in card) != taken


def test_figures_of_other_data_or_of_a_task_are_not_stated(run_copy, scenes):
    (run_copy / "eval").mkdir()
    network = load_model(run_copy, "cpu").network
    own = open_dataset(scenes, "test").fingerprint
    tuned = {"task": "vqa", "split": "test", "checkpoint": "runs/demo", "accuracy": 60.0, "records": []}
    for figures, why in (
        (FIGURES | {"fingerprint": own}, ""),
        (FIGURES | {"fingerprint": "of other data"}, "other data than the model was trained on"),
        (FIGURES | {"fingerprint": own, "split": "no_split"}, "other data than the model was trained on"),
        (tuned, "a task, so there are no figures of retrieval"),
    ):
        (run_copy / "eval/test.json").write_text(json.dumps({"split": "test", "checkpoint": "runs/demo"} | figures))
        card = model_card(run_copy, network)
        assert ("| image to text |" in card) == (not why)
        assert (f"The run's evaluation is of {why}" in card) == bool(why)


def test_figures_of_other_weights_are_not_stated_whatever_their_name(run_copy):
    (run_copy / "eval").mkdir()
    file = run_copy / "eval/test.json"
    models = {step: load_model(run_copy / f"checkpoints/step_0000000{step}", "cpu") for step in (1, 2)}
    file.write_text(json.dumps(FIGURES | {"checkpoint": "runs/demo", "model": models[1].sha256, "split": "<b>\n# te"}))
    for step, model in models.items():
        card = model_card(run_copy / f"checkpoints/step_0000000{step}", model.network, model=model.sha256)
        assert ("| image to text |" in card) == (step == 1)
        assert "<b>" not in card
        assert "\n# te" not in card


def test_a_model_that_rebuilds_no_better_than_without_an_image_says_so(run_copy):
    network = load_model(run_copy, "cpu").network
    (run_copy / "eval").mkdir()
    words = "Masked patches are not rebuilt better than by a predictor that sees no image"
    for masked_l1, median, said in ((0.31, 0.5, False), (0.6, 0.5, True), (0.6, None, False), (0.95, None, True)):
        changed = {"masked_l1": masked_l1, "masked_l1_train_median": median}
        (run_copy / "eval/test.json").write_text(json.dumps(FIGURES | changed))
        assert (words in model_card(run_copy, network)) == said


def test_a_damaged_evaluation_is_refused(run_copy):
    network = load_model(run_copy, "cpu").network
    (run_copy / "eval").mkdir()
    for content in (
        "[1]",
        "{",
        "{}",
        json.dumps(FIGURES | {"tr": {}}),
        json.dumps(FIGURES | {"tr_95": None}),
        json.dumps(FIGURES | {"gain_text_nats_95": [1]}),
        json.dumps(FIGURES | {"masked_l1": "low"}),
        json.dumps({name: value for name, value in FIGURES.items() if name != "masked_l1_white"}),
    ):
        (run_copy / "eval/test.json").write_text(content)
        with pytest.raises(RunError, match=r"test.json: wanted the figures that `mvlm eval retrieval` writes, got"):
            model_card(run_copy, network)


def test_text_of_others_cannot_format():
    assert line("a | b\n\n# c <script>[x](y)") == r"a \| b \# c \<script\>\[x\](y)"
    assert line("CC BY-SA 4.0 (https://a.org)") == "CC BY-SA 4.0 (https://a.org)"
