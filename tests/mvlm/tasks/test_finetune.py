"""Fine-tuning of micro models on questions about coloured squares: loss, resume, baselines, errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvlm.config.finetune import FinetuneConfig
from mvlm.errors import ConfigError, RunError
from mvlm.inference.encode import eval_loader
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import find_checkpoint, read_metrics
from mvlm.runs.load import load_model
from mvlm.tasks.evaluate import evaluate_task, predict_split
from mvlm.tasks.finetune import finetune
from mvlm.tasks.registry import find_task, load_task
from mvlm.tasks.task import TaskOptions
from mvlm_dataloading import DataError, open_dataset
from support.questions import write_hypotheses, write_questions


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture(scope="session")
def hypotheses(tmp_path_factory) -> Path:
    return write_hypotheses(tmp_path_factory.mktemp("hypotheses") / "data")


@pytest.fixture(scope="session")
def data_of(questions, hypotheses, scenes) -> dict[str, Path]:
    """A data set for each task."""
    return {"vqa": questions, "entailment": hypotheses, "retrieval": scenes}


def configured(trained: Path, data: Path, out: Path, task: str = "vqa", **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "task": task, "checkpoint": trained, "data": data, "out": out, "max_steps": 2, "batch_size": 8,
        "lr_encoder": 3e-3, "lr_cross": 3e-3, "lr_pixels": 0.0, "lr_head": 3e-3, "warmup_steps": 2, "lr_end": 0.0,
        "crop_scale": (1.0, 1.0), "device": "cpu", "precision": "fp32", "weight_decay": 0.0, "answers": "classifier",
    }  # fmt: skip
    return FinetuneConfig(**(settings | changes))


def test_first_loss_is_that_of_equal_probabilities(trained, questions, tmp_path):
    """The head starts at zero, so each of the five answers has probability 1/2: 5 ln 2 of binary cross-entropy."""
    finetune(configured(trained, questions, tmp_path / "run", max_steps=1))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(5 * np.log(2), rel=1e-5)
    described = read_state(find_checkpoint(tmp_path / "run"))["task"]
    assert described["name"] == "vqa"
    # Of 32 questions, 16 are about the ground of scenes 0 to 15, which is white, and 4 about each colour.
    assert described["state"]["answers"] == ["white", "blue", "green", "red", "yellow"]
    assert "temperature" not in row


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "entailment"])  # retrieval: tests/promises/test_overfit.py
def test_sixteen_examples_are_learned_by_heart(trained, tmp_path, task):
    write = {"vqa": write_questions, "entailment": write_hypotheses}[task]
    data = write(tmp_path / "data", {"train": 16, "test": 4})
    settings = {"max_steps": 300, "warmup_steps": 30, "batch_size": 16, "log_every": 100}
    finetune(configured(trained, data, tmp_path / "run", task, **settings))
    figures, records = evaluate_task(tmp_path / "run", data, "train")
    assert figures["accuracy"] == 100
    assert [record["sample"] for record in records] == list(range(16))


@pytest.mark.parametrize("task, figure", [("vqa", "accuracy"), ("retrieval", "mean_r1")])
def test_resumed_run_equals_an_undisturbed_one(trained, data_of, tmp_path, task, figure):
    settings = {"eval_every_steps": 2, "ema_decay": 0.9, "max_steps": 4}
    finetune(configured(trained, data_of[task], tmp_path / "whole", task, **settings))
    settings |= {"checkpoint_every_steps": 2}
    finetune(configured(trained, data_of[task], tmp_path / "cut", task, **settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    finetune(configured(trained, data_of[task], tmp_path / "cut", task, resume=True, **settings))
    whole, cut = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert f"val_{figure}" in whole[-1]
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "accuracy", "itc_accuracy", "grad_norm", f"val_{figure}"):
            assert a.get(name) == b.get(name)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_accumulated_microbatches_give_the_same_gradients(trained, data_of, tmp_path, task):
    for name, accumulate in (("one", 1), ("four", 4)):
        finetune(configured(trained, data_of[task], tmp_path / name, task, accumulate=accumulate, plan="plain"))
    one, four = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_both_implementations_give_the_same_losses(trained, data_of, tmp_path, task):
    for plan in ("plain", "fast"):
        finetune(configured(trained, data_of[task], tmp_path / plan, task, plan=plan, max_steps=3))
    plain, fast = (read_metrics(tmp_path / plan / "metrics.jsonl") for plan in ("plain", "fast"))
    for a, b in zip(plain, fast, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("blind", ["image", "text"])
def test_a_blind_model_does_not_depend_on_what_it_cannot_see(trained, questions, tmp_path, blind):
    finetune(configured(trained, questions, tmp_path / "run", blind=blind))
    task, tokenizer = load_task(tmp_path / "run")
    with torch.no_grad():
        task.get_parameter("head.answers.weight").normal_()  # after two steps it hardly tells answers apart
    dataset = open_dataset(questions, "test")
    answers = [record["answer"] for record in predict_split(task, dataset, tokenizer, "fp32")]
    texts = [dataset.captions(i)[0] for i in range(len(dataset))]
    if blind == "image":
        assert len({(text, answer) for text, answer in zip(texts, answers, strict=True)}) == 2
    else:  # the two questions about an image differ in their numbers of tokens only
        groups = {(dataset.image_bytes(i), len(tokenizer.encode([texts[i]], 12)[0])) for i in range(len(dataset))}
        assert len(groups) <= len(set(zip(map(dataset.image_bytes, range(len(dataset))), answers, strict=True))) * 2


@pytest.mark.parametrize(
    "frozen, changed",
    [("none", {"image_encoder", "text_cross", "head"}), ("encoders", {"text_cross", "head"}), ("all", {"head"})],
)
def test_frozen_weights_stay(trained, questions, tmp_path, frozen, changed):
    finetune(configured(trained, questions, tmp_path / "run", freeze=frozen))
    before, (after, _) = load_model(trained)[0].state_dict(), load_task(tmp_path / "run")
    moved = {name.split(".")[0] for name, x in after.model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved >= changed - {"head"}
    assert not moved & ({"image_encoder", "text_encoder"} if frozen == "encoders" else set())
    assert frozen != "all" or not moved
    assert not moved & {"image_decoder", "pixel_head", "language_head", "matching_head"}
    assert after.get_parameter("head.answers.weight").abs().sum() > 0


def test_positions_are_resized_loudly(trained, questions, tmp_path, caplog):
    with caplog.at_level("INFO"):
        finetune(configured(trained, questions, tmp_path / "run", image_size=48, question_length=20))
    assert "image_encoder.position: resized from (17, 16) to (37, 16)" in caplog.text
    assert "text_encoder.position: resized from (12, 16) to (20, 16)" in caplog.text
    task, _ = load_task(tmp_path / "run")
    assert (task.config.image_size, task.config.text_length) == (48, 20)


def test_evaluation_writes_figures_and_records(trained, questions, tmp_path, run_mvlm):
    finetune(configured(trained, questions, tmp_path / "run"))
    out = tmp_path / "eval.json"
    words = ["--checkpoint", tmp_path / "run", "--data", questions, "--out", out, "--device", "cpu"]
    assert run_mvlm("eval", "vqa", *words).code == 0
    found = json.loads(out.read_text())
    assert found["questions"] == len(found["records"]) == 16
    assert set(found["by_question_type"]) == {"what colour", "what is"}
    low, high = found["accuracy_95"]
    assert low <= found["accuracy"] <= high
    wrong = run_mvlm("eval", "entailment", *words)
    assert wrong.code == 2
    assert "wanted a run of the task entailment, found one of vqa" in wrong.err[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "vqa2"}, "task: wanted one of vqa, entailment, retrieval"),
        ({"task": "entailment"}, "wanted a label of contradiction, neutral, entailment, found None"),
        ({"min_count": 20}, "wanted at least 2 answers with 20 training questions each, found 0; lower --min-count"),
        ({"parallel": "fsdp"}, "parallel: wanted ddp"),
        ({"compile": True}, "which belong to pretraining"),
        ({"task": "retrieval"}, "found a sample of the task vqa; name a data set of images and captions"),
        ({"task": "retrieval", "data": "scenes", "blind": "text"}, "blind: wanted no"),
        ({"task": "retrieval", "data": "scenes", "freeze": "all"}, "freeze: wanted none or encoders, got all"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    trained, questions, scenes, tmp_path, changes, message
):
    data = scenes if "data" in changes else questions
    with pytest.raises((ConfigError, DataError), match=message):
        finetune(configured(trained, data, tmp_path / "run", **{k: v for k, v in changes.items() if k != "data"}))
    assert not (tmp_path / "run").exists()


def test_data_of_another_kind_and_runs_of_another_kind_are_refused(trained, scenes, questions, tmp_path):
    with pytest.raises(DataError, match="wanted a question with `question_id` and `answers`"):
        finetune(configured(trained, scenes, tmp_path / "run"))
    with pytest.raises(RunError, match="wanted a fine-tuned run, found a pretraining run"):
        load_task(trained)
    finetune(configured(trained, questions, tmp_path / "run"))
    with pytest.raises(RunError, match="wanted the settings of the run in this folder, got others"):
        finetune(configured(trained, questions, tmp_path / "run", blind="image", resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("task, figure", [("vqa", "accuracy"), ("retrieval", "mean_r1")])
def test_two_ranks_equal_one(trained, data_of, tmp_path, task, figure):
    finetune(configured(trained, data_of[task], tmp_path / "one", task, max_steps=3, eval_every_steps=3))
    settings = [
        *("--checkpoint", trained, "--data", data_of[task], "--out", tmp_path / "two", "--max-steps", "3"),
        *("--batch-size", "8", "--lr-encoder", "3e-3", "--lr-cross", "3e-3", "--lr-head", "3e-3", "--lr-end", "0"),
        *("--warmup-steps", "2", "--crop-scale", "1", "1", "--device", "cpu", "--precision", "fp32"),
        *("--weight-decay", "0", "--eval-every-steps", "3"),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "mvlm", "finetune", task, *map(str, settings)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a.get(f"val_{figure}") == b.get(f"val_{figure}")
    assert f"val_{figure}" in two[-1]


def test_a_retrieval_run_is_a_model_for_every_other_command(trained, scenes, tmp_path, run_mvlm):
    """Evaluation takes it as a pretraining run; another task starts from it; its losses are ITC's and ITM's."""
    finetune(configured(trained, scenes, tmp_path / "run", "retrieval", max_steps=1, ema_decay=0.5))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(row["itc"] + row["itm"], rel=1e-6)
    assert "temperature" in row
    task, _ = load_task(tmp_path / "run")
    found = load_model(tmp_path / "run").network.state_dict()
    before = load_model(trained)[0].state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in task.model.state_dict().items())
    moved = {name.split(".")[0] for name, x in found.items() if not torch.equal(x, before[name])}
    assert moved >= {"image_encoder", "text_encoder", "text_cross", "matching_head", "text_projection"}
    assert not moved & {"image_decoder", "pixel_head", "language_head"}
    out = tmp_path / "figures.json"
    words = ("eval", "retrieval", "--checkpoint", tmp_path / "run", "--data", scenes, "--out", out, "--device", "cpu")
    assert run_mvlm(*words).code == 0
    assert {"tr", "ir", "itc", "itm"} <= set(json.loads(out.read_text()))


def test_every_trained_parameter_gets_a_gradient_and_the_fast_step_needs_fewer_operations(trained, questions):
    """Packed text leaves out padding. DDP waits for every parameter that is not frozen."""
    model, tokenizer = load_model(trained)
    dataset = open_dataset(questions, "train")
    task = find_task("vqa")(model.train(), TaskOptions(answers="classifier"), {"answers": ["red", "blue"]})
    batch, _ = next(iter(eval_loader(dataset, model, tokenizer)))
    targets = [x[batch.sample_id] for x in task.targets(dataset)]
    flops = {}
    for plan in ("plain", "fast"):
        task.zero_grad()
        with FlopCounterMode(display=False) as counter:
            task.losses(batch, targets, plan).total.backward()
        flops[plan] = counter.get_total_flops()
        assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    assert flops["fast"] < flops["plain"]
