"""Fine-tuning of micro models on questions about coloured squares: loss, resume, baselines, errors."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm.runs.checkpoint import read_folder_shapes, read_state, sha256
from mvlm.runs.folder import find_checkpoint, read_metrics
from mvlm.runs.load import load_without_head
from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import architecture_of, build_trainer, finetune, open_inputs
from mvlm.tasks.load import load_task
from mvlm.tasks.score import score
from mvlm_dataloading import DataError, ShardWriter, open_dataset
from support.folders import reproducible_rows
from support.forgery import change_tensors, sign
from support.models import micro_model
from support.questions import finetune_config as configured
from support.questions import write_hypotheses


@pytest.fixture(scope="module")
def tuned(trained, questions, tmp_path_factory) -> Path:
    """A run of two steps that answers questions. Read only."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    finetune(configured(trained, questions, out))
    return out


@pytest.fixture
def tuned_copy(tuned, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(tuned, tmp_path / "tuned"))


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
def test_a_run_is_resumed_without_its_pretrained_model(run_copy, questions, tmp_path):
    """Also if the newest of its own checkpoints is damaged."""
    settings: dict[str, Any] = {"max_steps": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 3, "log_every": 1}
    settings |= {"answers": "masked", "question_length": 24, "image_size": 48, "ema_decay": 0.5}
    run, copy = tmp_path / "tuned", tmp_path / "copy"
    finetune(configured(run_copy, questions, run, **settings))
    task, _ = load_task(run)
    assert (task.config.image_size, task.config.text_length) == (48, 24)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step_00000003")
    (copy / "checkpoints/step_00000002/model.json").write_text("{")
    shutil.rmtree(run_copy)
    again: dict[str, Any] = settings | {"keep_checkpoints": 1}
    finetune(configured(tmp_path / "elsewhere", questions, copy, resume=True, **again))
    assert find_checkpoint(copy).name == "step_00000003"  # the damaged one does not count as one that is kept
    for a, b in zip(reproducible_rows(run), reproducible_rows(copy), strict=True):
        assert a == b
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="elsewhere"):
        finetune(configured(tmp_path / "elsewhere", questions, copy, resume=True, **settings))


def test_a_run_with_other_sizes_or_weights_that_are_not_finite_is_refused(tuned_copy, questions, tmp_path):
    """By `--resume` too, which passes such a checkpoint over as a damaged one."""
    out = tuned_copy
    newest = find_checkpoint(out)
    settings = json.loads((newest / "model.json").read_text())
    for name, value in (("image_layers", 10**6), ("vocab_size", 10**9)):  # refused before a network is made
        (newest / "model.json").write_text(json.dumps(settings | {name: value}))
        sign(newest)
        for load in (load_task, load_without_head):
            with pytest.raises(RunError, match=rf"model\.json: .*{name} "):
                load(out)
        with pytest.raises(RunError, match="gone"):  # the pretrained model is asked for, as without checkpoints
            architecture_of(configured(tmp_path / "gone", questions, out, max_steps=3, resume=True))
    (newest / "model.json").write_text(json.dumps(settings))
    change_tensors(newest / "model", lambda name, t: t.fill_(torch.inf) if name == "head.answers.bias" else t)
    sign(newest)
    with pytest.raises(RunError, match=r"head\.answers\.bias"):
        load_task(out)


FROZEN: dict[str, Any] = {"train_image": "frozen", "train_text": "frozen"}
ALL_FROZEN = FROZEN | {"train_cross": "frozen"}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["none", "encoders", "all"])
def test_frozen_weights_stay(trained, questions, tuned, tmp_path, frozen):
    run = tuned if frozen == "none" else tmp_path / "run"
    if frozen != "none":
        finetune(configured(trained, questions, run, **(FROZEN if frozen == "encoders" else ALL_FROZEN)))
    before, (after, _) = load_without_head(trained).network.state_dict(), load_task(run)
    moved = {name.split(".")[0] for name, x in after.model.state_dict().items() if not torch.equal(x, before[name])}
    cross = {"image_cross", "text_cross"}
    wanted = {"none": {"image_encoder", "text_encoder"} | cross, "encoders": cross, "all": set()}
    assert moved == wanted[frozen]
    assert after.get_parameter("head.answers.weight").abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("task, data", [("vqa", "questions"), ("retrieval", "scenes")])
def test_adapters_of_a_task_are_saved_alone_resumed_and_merged(trained, request, tmp_path, task, data):
    """Decoder and image tower are the pretrained ones. A run from the merged model trains all weights again."""
    parts: dict[str, Any] = {"task": task, "train_image": "frozen", "train_text": "lora", "train_cross": "lora"}
    settings: dict[str, Any] = parts | {
        "max_steps": 2,
        "checkpoint_every_steps": 1,
        "ema_decay": 0.5,
        "eval_every_steps": 2,
    }
    places = trained, request.getfixturevalue(data)
    finetune(configured(*places, tmp_path / "run", **settings))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/step_00000002")
    finetune(configured(*places, tmp_path / "copy", resume=True, **settings))
    one, other = (load_task(tmp_path / name)[0].state_dict() for name in ("run", "copy"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    before, after = (load_without_head(path).network.state_dict() for path in (trained, tmp_path / "run"))
    assert all(torch.equal(tensor, one[f"model.{name}"]) for name, tensor in after.items())
    moved = {name.split(".")[0] for name, x in after.items() if not torch.equal(x, before[name])}
    projections = (
        {"image_projection", "text_projection", "matching_head", "log_scale"} if task == "retrieval" else set()
    )
    assert moved == {"text_encoder", "image_cross", "text_cross"} | projections
    shapes = read_folder_shapes(find_checkpoint(tmp_path / "run") / "model")
    assert not [name for name in shapes if "original" in name or "image_encoder" in name or "decoder" in name]
    assert all(p.requires_grad for p in load_without_head(tmp_path / "run").network.parameters())


def unanswered(folder: Path, data: Path, splits: dict[str, str]) -> Path:
    """A copy of questions, of which those of the split "validation" have no answers, as VQA v2's test split has none.

    Args:
        splits: the split of `data` that each split is a copy of.
    """
    with ShardWriter(folder, name="unanswered", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for split, source in splits.items():
            dataset = open_dataset(data, source)
            for i in range(len(dataset)):
                known = dataset.metadata(i)
                kept = known if split == "train" else {"question_id": known["question_id"]}
                key, image, texts = str(dataset.keys[i]), dataset.image_bytes(i), dataset.captions(i)
                assert writer.add(key, image, texts, kept, split=split) is None
    return folder


@pytest.mark.slow
def test_evaluation_writes_figures_records_and_predictions(trained, tuned, questions, tmp_path, run_mvlm):
    """A split without answers gets predictions, for a server, and no accuracy."""
    out, results, annotations = tmp_path / "eval.json", tmp_path / "results.json", tmp_path / "annotations.json"
    words = ["--checkpoint", tuned, "--out", out, "--device", "cpu", "--predictions", results]
    assert run_mvlm("eval", "vqa", *words, "--data", questions).code == 0
    found = json.loads(out.read_text())
    test = open_dataset(questions, "test")
    annotations.write_text(json.dumps({"annotations": [test.metadata(i) for i in range(len(test))]}))
    scored = score("vqa", results, annotations)
    assert (scored["accuracy"], scored["examples"]) == (found["accuracy"], 16)
    assert scored["accuracy_95"] == found["accuracy_95"]
    assert found["questions"] == len(found["records"]) == 16
    assert set(found["by_question_type"]) == {"what colour", "what is"}
    assert run_mvlm("eval", "entailment", *words, "--data", questions).code == 2
    without = unanswered(tmp_path / "without", questions, {"train": "train", "validation": "test"})
    assert run_mvlm("eval", "vqa", *words, "--data", without, "--split", "validation").code == 0
    figures = json.loads(out.read_text())
    assert figures["questions"] == 16
    assert "accuracy" not in figures
    written = json.loads(results.read_text())
    assert written == [{"question_id": f"test-{r['sample']}", "answer": r["answer"]} for r in figures["records"]]
    with pytest.raises(DataError, match="answers"):  # training has to score it
        finetune(configured(trained, without, tmp_path / "other", eval_every_steps=1))
    assert not (tmp_path / "other").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task": "vqa2"}, "task: wanted one of caption, entailment, pairs, retrieval, vqa"),
    ({"min_count": 20}, "with 20 training questions"),
    ({"train_text": "lora", "random_weights": True}, "random_weights"),
    ({"answers": "masked", **ALL_FROZEN}, "train_cross"),
    ({"answers": "masked", "question_length": 9}, "question_length"),
    ({"train_text": "frozen", "question_length": 13}, "question_length"),
    ({"image_size": 40}, "image_size"),
    ({"batch_size": 7, "accumulate": 2}, "multiple of 1 ranks x 2 microbatches"),
    ({"preemption_file": Path(__file__)}, "preemption_file"),
    ({"task": "retrieval"}, "vqa"),
    ({"task": "retrieval", "data": "scenes", "blind": "text"}, "blind"),
    ({"task": "retrieval", "data": "scenes", **ALL_FROZEN}, "train_cross"),
    ({"task": "retrieval", "data": "scenes", "questions_per_image": 2}, "questions_per_image"),
    ({"task": "caption", "data": "scenes", "questions_per_image": 2}, "questions_per_image"),
    ({"task": "caption", "data": "scenes", "blind": "text"}, "blind"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    trained, questions, scenes, tmp_path, changes, message
):
    data = scenes if "data" in changes else questions
    with pytest.raises((ConfigError, DataError), match=message):
        finetune(configured(trained, data, tmp_path / "run", **{k: v for k, v in changes.items() if k != "data"}))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_or_without_a_head_is_refused(trained, run_copy, tuned_copy, questions, tmp_path):
    load_without_head(tuned_copy, "cpu").save(tmp_path / "model")
    for folder, word in ((trained, "pretraining run"), (tmp_path / "model", "exported folder")):
        with pytest.raises(RunError, match=word):
            load_task(folder)
    with pytest.raises(RunError, match="blind"):
        finetune(configured(trained, questions, tuned_copy, blind="image", resume=True))
    shutil.rmtree(tuned_copy / "checkpoints")
    with pytest.raises(RunError, match="checkpoint"):
        finetune(configured(run_copy, questions, tuned_copy, resume=True))


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
def test_a_run_of_version_0_2_0_is_evaluated_and_resumed(trained, tmp_path):
    hypotheses = write_hypotheses(tmp_path / "data")
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


def test_a_run_with_an_option_that_is_gone_is_refused(trained, tuned_copy, questions):
    config = configured(trained, questions, tuned_copy, max_steps=3, resume=True)
    for others, name in (({}, "answers"), ({"answers": "masked", "generate": True}, "generate")):
        as_version_0_2_0(config.out, **others)
        for call in (lambda: load_task(config.out), lambda: finetune(config)):
            with pytest.raises(ConfigError, match=f"{name}: wanted"):
                call()


def test_masks_of_captions_are_the_tasks_and_not_those_of_pretraining(scenes, tokenizer, tmp_path):
    """Any share of the words may be masked, so that some captions are fully masked, as generation begins."""
    micro_model(whole_word_masking=True).float().save_pretrained(tmp_path / "pretrained")
    tokenizer.save(tmp_path / "pretrained/tokenizer.json")
    config = configured(tmp_path / "pretrained", scenes, tmp_path / "run", task="caption", max_steps=6)
    alone = World(0, 1, 0, torch.device("cpu"))
    trainer = build_trainer(open_inputs(config, alone), alone, "")
    whole = 0
    for (batch, masks), _ in zip(trainer.loader, range(6), strict=False):
        hidden = set(masks.token_ids.tolist())
        bounds = batch.cu_seqlens.tolist()
        whole += sum(set(range(start + 1, end - 1)) <= hidden for start, end in itertools.pairwise(bounds))
    trainer.loader.close()
    assert whole
