"""Fine-tuning of micro models on questions about coloured squares: loss, resume, baselines, errors."""

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError, RunError
from mvlm.model.network import MaskVLMNetwork
from mvlm.runs.checkpoint import read_state, sha256
from mvlm.runs.folder import find_checkpoint, read_metrics
from mvlm.runs.load import load_model
from mvlm.tasks import caption, masked_answers
from mvlm.tasks.caption import Captioning
from mvlm.tasks.evaluate import evaluate_task, predict_split
from mvlm.tasks.finetune import finetune
from mvlm.tasks.registry import load_task
from mvlm.tasks.score import score
from mvlm.tasks.start import architecture_of
from mvlm.training import run as training_run
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from mvlm_dataloading import DataError, ShardWriter, open_dataset
from support.folders import reproducible_rows
from support.forgery import change_tensors, sign
from support.models import micro_config, pretrain_config
from support.questions import finetune_config as configured
from support.questions import write_hypotheses, write_questions
from support.scenes import png, scene


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture(scope="session")
def hypotheses(tmp_path_factory) -> Path:
    return write_hypotheses(tmp_path_factory.mktemp("hypotheses") / "data")


@pytest.mark.slow
def test_first_loss_is_that_of_the_answers_frequencies(trained, questions, tmp_path):
    """The head starts at zero and at the frequencies of the answers: the loss of all questions is their entropy."""
    finetune(configured(trained, questions, tmp_path / "run", max_steps=1, batch_size=32))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shares = np.array([16, 4, 4, 4, 4]) / 32
    entropies = -shares * np.log(shares) - (1 - shares) * np.log(1 - shares)
    assert row["loss"] == pytest.approx(entropies.sum(), rel=1e-5)
    described = read_state(find_checkpoint(tmp_path / "run"))["task"]
    assert described["name"] == "vqa"
    # Of 32 questions, 16 are about the ground of scenes 0 to 15, which is white, and 4 about each colour.
    assert described["state"]["answers"] == ["white", "blue", "green", "red", "yellow"]
    assert "temperature" not in row


@pytest.mark.slow
def test_accumulated_microbatches_give_the_same_gradients(trained, questions, tmp_path):
    for name, accumulate in (("one", 1), ("four", 4)):
        finetune(configured(trained, questions, tmp_path / name, accumulate=accumulate, plan="plain"))
    one, four = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "task, module, name, changes",
    [
        ("vqa", masked_answers, "weighted_cross_entropy", {"answers": "masked", "question_length": 20}),
        ("caption", caption, "linear_cross_entropy", {}),
    ],
)
def test_accuracy_is_that_of_all_tokens_of_a_step(
    trained, questions, scenes, tmp_path, monkeypatch, task, module, name, changes
):
    """However the batch is cut. Here a token counts as right if its number is even."""
    judged: list[list[int]] = []
    real = getattr(module, name)

    def loss_of(*arguments):
        targets = next(x for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
        judged.append(targets.tolist())
        return real(*arguments)[0], (targets % 2 == 0).float().mean().nan_to_num()

    monkeypatch.setattr(module, name, loss_of)
    (tmp_path / "answers.json").write_text('["yellow", "red"]')
    given = {"answer_list": tmp_path / "answers.json"} if "answers" in changes else {}
    data = questions if task == "vqa" else scenes
    config = configured(trained, data, tmp_path / "run", task, max_steps=1, accumulate=8, **given, **changes)
    finetune(config)
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    tokens = [token for part in judged for token in part]
    assert len(judged) == 8
    assert len(set(map(len, judged))) > 1  # 0 is among them, if answers are masked
    assert row["accuracy"] == pytest.approx(np.mean([token % 2 == 0 for token in tokens]), rel=1e-6)


def test_a_run_is_resumed_without_its_pretrained_model(run_copy, questions, tmp_path):
    """Also if the newest of its own checkpoints is damaged."""
    settings: dict[str, Any] = {"max_steps": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 3, "log_every": 1}
    settings |= {"answers": "masked", "question_length": 24, "image_size": 48, "ema_decay": 0.5}
    run, copy = tmp_path / "tuned", tmp_path / "copy"
    finetune(configured(run_copy, questions, run, **settings))
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step_00000003")
    (copy / "checkpoints/step_00000002/model.json").write_text("{")
    shutil.rmtree(run_copy)
    finetune(configured(tmp_path / "elsewhere", questions, copy, resume=True, **settings))
    for a, b in zip(reproducible_rows(run), reproducible_rows(copy), strict=True):
        assert a == b
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="elsewhere"):
        finetune(configured(tmp_path / "elsewhere", questions, copy, resume=True, **settings))


def test_another_pretrained_model_is_refused_before_a_run_has_a_checkpoint(trained, run_copy, questions, tmp_path):
    finetune(configured(trained, questions, tmp_path / "tuned"))
    shutil.rmtree(tmp_path / "tuned/checkpoints")
    with pytest.raises(RunError, match=r"got others \(checkpoint: config.json has"):
        finetune(configured(run_copy, questions, tmp_path / "tuned", resume=True))


@pytest.mark.slow
def test_a_run_with_settings_of_another_size_or_weights_that_are_not_finite_is_refused(
    trained, questions, tmp_path, monkeypatch
):
    """Before a network is made; by `--resume` too, which passes such a checkpoint over as a damaged one."""
    out = tmp_path / "run"
    finetune(configured(trained, questions, out))
    newest = find_checkpoint(out)
    settings = json.loads((newest / "model.json").read_text())

    def write(**changes: Any) -> None:
        (newest / "model.json").write_text(json.dumps(settings | changes))
        sign(newest)

    with monkeypatch.context() as patch:
        patch.setattr(MaskVLMNetwork, "__init__", lambda *_: pytest.fail("made a network"))
        for changes in ({"image_layers": 10**6}, {"vocab_size": 10**9}):
            write(**changes)
            for load in (load_task, load_model):
                with pytest.raises(RunError, match=rf"model\.json: .*{next(iter(changes))} "):
                    load(out)
            config = configured(tmp_path / "gone", questions, out, max_steps=3, resume=True)
            with pytest.raises(RunError, match="gone: wanted a run"):  # it is asked for, as without checkpoints
                architecture_of(config)
    write()
    load_task(out)
    change_tensors(newest / "model", lambda name, t: t.fill_(torch.inf) if name == "head.answers.bias" else t)
    write()
    with pytest.raises(RunError, match=r"finite values, .* head\.answers\.bias"):
        load_task(out)


@pytest.mark.slow
@pytest.mark.parametrize("blind", ["image", "text"])
def test_a_blind_model_does_not_depend_on_what_it_cannot_see(trained, questions, tmp_path, blind):
    finetune(configured(trained, questions, tmp_path / "run", blind=blind))
    task, tokenizer = load_task(tmp_path / "run")
    with torch.no_grad():
        task.get_parameter("head.answers.weight").normal_()  # after two steps it hardly tells answers apart
    dataset = open_dataset(questions, "test")
    answers = [record["answer"] for record in predict_split(task, dataset, tokenizer, "fp32") or ()]
    texts = [dataset.captions(i)[0] for i in range(len(dataset))]
    if blind == "image":
        assert len({(text, answer) for text, answer in zip(texts, answers, strict=True)}) == 2
    else:  # the two questions about an image differ in their numbers of tokens only
        groups = {(dataset.image_bytes(i), len(tokenizer.encode([texts[i]], 12)[0])) for i in range(len(dataset))}
        assert len(groups) <= len(set(zip(map(dataset.image_bytes, range(len(dataset))), answers, strict=True))) * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "frozen, changed",
    [("none", {"image_encoder", "text_cross", "head"}), ("encoders", {"text_cross", "head"}), ("all", {"head"})],
)
def test_frozen_weights_stay(trained, questions, tmp_path, frozen, changed):
    finetune(configured(trained, questions, tmp_path / "run", freeze=frozen))
    before, (after, _) = load_model(trained).network.state_dict(), load_task(tmp_path / "run")
    moved = {name.split(".")[0] for name, x in after.model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved >= changed - {"head"}
    assert not moved & ({"image_encoder", "text_encoder"} if frozen == "encoders" else set())
    assert frozen != "all" or not moved
    assert not moved & {"image_decoder", "pixel_head", "language_head", "matching_head"}
    assert after.get_parameter("head.answers.weight").abs().sum() > 0


@pytest.mark.slow
def test_positions_are_resized_loudly(trained, questions, tmp_path, caplog):
    with caplog.at_level("INFO"):
        finetune(configured(trained, questions, tmp_path / "run", image_size=48, question_length=20))
    assert caplog.text.count("image_encoder.position: resized from (17, 16) to (37, 16)") == 1
    assert caplog.text.count("text_encoder.position: resized from (12, 16) to (20, 16)") == 1
    task, _ = load_task(tmp_path / "run")
    assert (task.config.image_size, task.config.text_length) == (48, 20)


@pytest.mark.slow
def test_evaluation_writes_figures_and_records(trained, questions, tmp_path, run_mvlm):
    finetune(configured(trained, questions, tmp_path / "run"))
    out = tmp_path / "eval.json"
    words = ["--checkpoint", tmp_path / "run", "--data", questions, "--out", out, "--device", "cpu"]
    results, annotations = tmp_path / "results.json", tmp_path / "annotations.json"
    assert run_mvlm("eval", "vqa", *words, "--predictions", results).code == 0
    found = json.loads(out.read_text())
    test = open_dataset(questions, "test")
    annotations.write_text(json.dumps({"annotations": [test.metadata(i) for i in range(len(test))]}))
    scored = score("vqa", results, annotations)
    assert (scored["accuracy"], scored["examples"]) == (found["accuracy"], 16)
    assert found["questions"] == len(found["records"]) == 16
    assert set(found["by_question_type"]) == {"what colour", "what is"}
    low, high = found["accuracy_95"]
    assert low <= found["accuracy"] <= high
    wrong = run_mvlm("eval", "entailment", *words)
    assert wrong.code == 2
    assert "wanted a run of the task entailment, found one of vqa" in wrong.err[-1]


@pytest.mark.slow
def test_a_split_without_answers_has_predictions_but_no_accuracy(trained, tmp_path, run_mvlm):
    """As the test split of VQA v2."""
    data = write_questions(tmp_path / "data")
    finetune(configured(trained, data, tmp_path / "run"))
    without = tmp_path / "without"
    with ShardWriter(without, name="test", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(4):
            writer.add(f"{i}", png(scene(i)[0]), ["what is behind it?"], {"question_id": 7 + i}, split="test")
    out, results = tmp_path / "eval.json", tmp_path / "results.json"
    words = ["--checkpoint", tmp_path / "run", "--data", without, "--out", out, "--device", "cpu"]
    assert run_mvlm("eval", "vqa", *words, "--predictions", results).code == 0
    figures = json.loads(out.read_text())
    assert figures["questions"] == 4
    assert "accuracy" not in figures
    written = json.loads(results.read_text())
    assert written == [{"question_id": 7 + r["sample"], "answer": r["answer"]} for r in figures["records"]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "vqa2"}, "task: wanted one of caption, entailment, pairs, retrieval, vqa"),
        ({"task": "entailment"}, "wanted a label of contradiction, neutral, entailment, found None"),
        ({"min_count": 20}, "wanted at least 2 answers with 20 training questions each, found 0; lower --min-count"),
        ({"answers": "masked", "freeze": "all"}, "freeze: wanted none or encoders, got all; .* no head to train"),
        (
            {"freeze": "encoders", "question_length": 13},
            "question_length: wanted at most the 12 tokens .* give --quest",
        ),
        ({"image_size": 40}, "image_size: wanted a multiple of 16 pixels, .* got 40; give --image-size (32|48)"),
        ({"batch_size": 7, "accumulate": 2}, "wanted a multiple of 1 ranks x 2 microbatches = 2, got 7"),
        ({"preemption_file": Path(__file__)}, "preemption_file: .* exists before the run starts"),
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


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_trains_with_deterministic_kernels(
    trained, questions, tmp_path, monkeypatch, deterministic
):
    """On a CPU they are the usual ones, so the test looks for the context that chooses them."""
    entered: list[str] = []
    monkeypatch.setattr(training_run, "deterministic_kernels", partial(recorded, entered))
    during: list[list[str]] = []
    monkeypatch.setattr(Trainer, "train", lambda _: during.append(list(entered)))
    finetune(configured(trained, questions, tmp_path / "run", deterministic=deterministic))
    assert during == [["cpu"] if deterministic else []]
    assert entered == []


@contextmanager
def recorded(entered: list[str], device: torch.device) -> Iterator[None]:
    entered.append(device.type)
    yield
    entered.pop()


@pytest.mark.slow
def test_data_of_another_kind_and_runs_of_another_kind_are_refused(trained, scenes, questions, tmp_path):
    with pytest.raises(DataError, match="wanted a question with `question_id` and `answers`"):
        finetune(configured(trained, scenes, tmp_path / "run"))
    with pytest.raises(RunError, match="wanted a fine-tuned run, found a pretraining run"):
        load_task(trained)
    finetune(configured(trained, questions, tmp_path / "run"))
    with pytest.raises(RunError, match="wanted the settings of the run in this folder, got others"):
        finetune(configured(trained, questions, tmp_path / "run", blind="image", resume=True))


def as_version_0_2_0(run: Path, **others: Any) -> None:
    """Write into the state of a run's checkpoints the options of version 0.2.0, as its runs of entailment have them."""
    for checkpoint in (run / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text())
        old = {"answers": "decoder", "candidates": 128, "generate": False, "order": "mask-predict"}
        state["task"]["options"] |= old | others
        state["task"]["state"]["others"] = []
        (checkpoint / "state.json").write_text(json.dumps(state))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["sha256"]["state.json"] = sha256(checkpoint / "state.json")
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | old | others))


@pytest.mark.slow
def test_a_run_of_version_0_2_0_is_evaluated_and_resumed(trained, hypotheses, tmp_path):
    settings = {"task": "entailment", "max_steps": 3, "checkpoint_every_steps": 2, "keep_checkpoints": 2}
    run, old = tmp_path / "run", tmp_path / "old"
    finetune(configured(trained, hypotheses, run, **settings))
    shutil.copytree(run, old)
    shutil.rmtree(old / "checkpoints/step_00000003")
    as_version_0_2_0(old)
    finetune(configured(trained, hypotheses, old, resume=True, **settings))
    assert reproducible_rows(run) == reproducible_rows(old)
    as_version_0_2_0(old)
    assert evaluate_task(old, hypotheses, "test") == evaluate_task(run, hypotheses, "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "others, message",
    [
        ({}, "answers: wanted classifier or masked, got decoder, which is gone; mvlm 0.2.0 is the last"),
        (
            {"answers": "masked", "generate": True},
            "generate: wanted its default, false, as the setting is gone, got true",
        ),
    ],
)
def test_a_run_with_an_option_that_is_gone_is_refused(trained, questions, tmp_path, others, message):
    config = configured(trained, questions, tmp_path / "run", max_steps=1)
    finetune(config)
    as_version_0_2_0(config.out, **others)
    for call in (lambda: load_task(config.out), lambda: finetune(replace(config, max_steps=2, resume=True))):
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_masks_of_captions_are_the_tasks_and_not_those_of_pretraining(scenes, tmp_path, monkeypatch):
    """With a fixed share of masked words no caption was ever fully masked, as generation begins."""
    pretraining = micro_config(whole_word_masking=True, image_masking="variable")
    pretrain(pretrain_config(scenes, tmp_path / "pretrained", max_steps=1, model=pretraining))
    masks, real = [], Captioning.losses_of_step

    def losses_of_step(self, batch, found, *rest):
        masks.append((batch, found))
        return real(self, batch, found, *rest)

    monkeypatch.setattr(Captioning, "losses_of_step", losses_of_step)
    finetune(configured(tmp_path / "pretrained", scenes, tmp_path / "run", task="caption", max_steps=6))
    whole = 0
    for batch, found in masks:
        assert found.patch_weights is None
        hidden = set(found.token_ids.tolist())
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            whole += set(range(start + 1, end - 1)) <= hidden
    assert whole


@pytest.mark.parametrize("task, flag", [("caption", "lengths"), ("caption", "iterations")])
def test_numbers_of_an_evaluation_are_checked_before_it_begins(run_mvlm, tmp_path, task, flag):
    done = run_mvlm("eval", task, "--checkpoint", tmp_path, "--data", tmp_path, f"--{flag}", 0)
    assert (done.code, done.err[-1]) == (2, f"mvlm: {flag}: wanted at least 1, got 0")


def test_the_word_after_the_task_is_a_recipe(run_mvlm):
    done = run_mvlm("finetune", "vqa", "base", "--help")
    assert done.code == 0
    text = " ".join(" ".join(done.out).split())
    assert "(default: 13900)" in text
    assert "13900" not in " ".join(run_mvlm("finetune", "vqa", "--help").out)
    wrong = run_mvlm("finetune", "vqa", "huge", "--out", "run")
    assert wrong.code == 2
    assert "unknown recipe: wanted one of tiny, base, got 'huge'" in wrong.err[-1]


def test_a_validation_split_without_answers_is_refused_before_anything_is_written(trained, tmp_path):
    data = write_questions(tmp_path / "data")
    unanswered = tmp_path / "unanswered"
    with ShardWriter(unanswered, name="unanswered", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for split in ("train", "validation"):
            dataset = open_dataset(data, split)
            for i in range(len(dataset)):
                known = dataset.metadata(i)
                kept = known if split == "train" else {"question_id": known["question_id"]}
                key, image, texts = str(dataset.keys[i]), dataset.image_bytes(i), dataset.captions(i)
                assert writer.add(key, image, texts, kept, split=split) is None
    with pytest.raises(DataError, match="wanted a question with `question_id` and `answers`, found"):
        finetune(configured(trained, unanswered, tmp_path / "run", "vqa", eval_every_steps=1))
    assert not (tmp_path / "run").exists()
    finetune(configured(trained, data, tmp_path / "run", "vqa"))
    figures, records = evaluate_task(tmp_path / "run", unanswered, "validation")  # predicted for a server to score
    assert figures["questions"] == len(records) > 0
    assert "accuracy" not in figures


def test_an_exported_folder_has_no_head_and_says_so(trained, questions, tmp_path, caplog):
    finetune(configured(trained, questions, tmp_path / "run", "vqa"))
    with caplog.at_level("INFO", "mvlm"):
        load_model(tmp_path / "run", "cpu").save(tmp_path / "model")
    assert "the network without the head of the task vqa" in caplog.text
    with pytest.raises(RunError, match="wanted a fine-tuned run or one of its checkpoints, found an exported folder"):
        load_task(tmp_path / "model")
