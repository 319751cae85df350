"""Resumed runs against uninterrupted ones, and resumes that are refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from mvlm.errors import RunError
from mvlm.training.run import pretrain
from mvlm.verify.verify import verify_run
from mvlm_dataloading import DataError, tokenizer_for
from support.folders import LOSSES, checkpoint_contents, folder_hash, reproducible_rows, rows_of
from support.forgery import change_tensors, checkpoint, reseal
from support.models import micro_config, pretrain_config
from support.resumes import interrupt
from support.scenes import write_scenes


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        # These have parameters without a state of the optimizer.
        pytest.param({"itc_weight": 0.0, "itm_weight": 0.0}, marks=pytest.mark.extended),
        pytest.param({"optimizer": "muon"}, marks=pytest.mark.extended),
        pytest.param({"eval_every_steps": 2, "batch_size": 7, "ema_decay": 0.9}, marks=pytest.mark.extended),
    ],
)
def test_resumed_run_equals_the_uninterrupted_run(scenes, tmp_path, without_tensorboard, settings):
    """Six steps, against a run that is stopped in its fifth and continues from its checkpoint of the third."""
    whole = pretrain_config(scenes, tmp_path / "whole", max_steps=6, **settings)
    pretrain(whole)

    broken = pretrain_config(scenes, tmp_path / "broken", max_steps=6, checkpoint_every_steps=3, **settings)
    interrupt(broken, 4)
    # The row of the fourth step is written while the fifth runs.
    assert [row["step"] for row in rows_of(broken.out)] == [1, 2, 3]
    torch.manual_seed(99)
    pretrain(pretrain_config(scenes, tmp_path / "broken", max_steps=6, resume=True, **settings))

    assert reproducible_rows(broken.out) == reproducible_rows(whole.out)
    assert [row["step"] for row in rows_of(broken.out)] == [1, 2, 3, 4, 5, 6]
    mine, theirs = (checkpoint_contents(run.out / "checkpoints/step_00000006") for run in (broken, whole))
    assert mine == theirs
    assert {name.split("/")[0] for name in mine} > {"model", "optimizer", "generators", "state.json"}


STAGES = {
    "stages": ("0:48:0.4", "2:32"),
    "max_steps": 4,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 0,
    "ema_decay": 0.9,
}
THREE = {"stages": ("0:48:0.4", "2:16", "4:32"), "max_steps": 6}


def model_of(run):
    contents = checkpoint_contents(run / "checkpoints/step_00000004")
    return {name: value for name, value in contents.items() if name.startswith(("model/", "optimizer/", "ema/"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "further",
    [
        {},
        pytest.param(THREE | {"eval_every_steps": 2, "eval_images": 4}, marks=pytest.mark.extended),
        pytest.param(THREE | {"accumulate": 2, "checkpoint_activations": True}, marks=pytest.mark.extended),
        pytest.param({"model": micro_config(drop_masked=True, output_positions=True)}, marks=pytest.mark.extended),
    ],
    ids=str,
)
def test_a_run_of_stages_resumes_exactly(scenes, tmp_path, without_tensorboard, further, caplog):
    """At the boundary of two stages and within one. `mvlm verify` makes all steps again."""
    settings = STAGES | further
    whole = pretrain_config(scenes, tmp_path / "whole", **settings)
    pretrain(whole)
    rows, last = reproducible_rows(whole.out), f"checkpoints/step_{whole.max_steps:08d}"
    assert [row["image_size"] for row in rows] == [whole.model_at(step).image_size for step in range(whole.max_steps)]
    wanted = checkpoint_contents(whole.out / last)
    for step in range(2, whole.max_steps):
        broken = pretrain_config(scenes, tmp_path / str(step), **settings)
        interrupt(broken, step)
        torch.manual_seed(99)
        caplog.clear()
        pretrain(replace(broken, resume=True))
        assert "pixels differ" not in caplog.text
        assert reproducible_rows(broken.out) == rows
        assert checkpoint_contents(broken.out / last) == wanted
    *checks, _ = verify_run(whole.out, steps=whole.max_steps)  # it was not evaluated
    assert [problem for check in checks for problem in check.problems] == []
    assert sum("replayed" in check.what for check in checks) == whole.max_steps


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stages_on_ranks_resume_exactly_and_on_one(scenes, tmp_path, without_tensorboard, ranks, on_ranks, parallel):
    """At the boundary of two stages."""
    settings = STAGES | {"precision": "fp32"}
    one, more, again, fewer = (tmp_path / name for name in ("one", "more", "again", "fewer"))
    pretrain(pretrain_config(scenes, one, **settings))
    interrupt(pretrain_config(scenes, more, **settings), 0)

    def run(out):
        words = ("pretrain", "--config", out / "config.json", "--out", out, "--resume", "--parallel", parallel)
        codes, said = on_ranks(ranks, *words)
        assert codes == [0] * ranks, said

    run(more)
    for out in (again, fewer):
        shutil.copytree(more, out)
        for step in (3, 4):
            shutil.rmtree(out / f"checkpoints/step_{step:08d}")
    run(again)
    pretrain(pretrain_config(scenes, fewer, resume=True, **settings))
    assert model_of(again) == model_of(more)
    assert reproducible_rows(again) == reproducible_rows(more)
    for out in (more, fewer):
        for ours, theirs in zip(rows_of(out), rows_of(one), strict=True):
            assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-4)


def test_a_resume_with_other_stages_is_refused(scenes, run_copy):
    with pytest.raises(RunError, match="stages: config"):
        pretrain(pretrain_config(scenes, run_copy, checkpoint_every_steps=1, resume=True, stages=("0:16", "1:32")))


WAYS = {"accumulate": 2, "checkpoint_activations": True, "plan": "plain", "self_attention": "math"}


@pytest.mark.slow
def test_a_resumed_run_may_compute_in_another_way(scenes, tmp_path, without_tensorboard, caplog):
    """Losses and weights are those of the whole run, but for rounding; each part can be made again to the bit."""
    settings = {"precision": "fp32", "max_steps": 4, "checkpoint_every_steps": 2, "keep_checkpoints": 0}
    whole = pretrain_config(scenes, tmp_path / "whole", **settings)
    pretrain(whole)
    broken = pretrain_config(scenes, tmp_path / "broken", **settings)
    interrupt(broken, 3)
    with caplog.at_level("INFO"):
        pretrain(pretrain_config(scenes, tmp_path / "broken", resume=True, **settings, **WAYS))
    said = next(text for text in caplog.messages if text.startswith("after step 2: "))
    assert all(f"{name} {value} in place of " in said for name, value in WAYS.items())
    for ours, theirs in zip(rows_of(broken.out), rows_of(whole.out), strict=True):
        assert ours["step"] == theirs["step"]
        for name in LOSSES:
            # Sums in another order. The first two steps are the same.
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4 if ours["step"] > 2 else 0), name
    contents = [checkpoint_contents(run.out / "checkpoints/step_00000004") for run in (broken, whole)]
    assert contents[0] != contents[1]
    *checks, _ = verify_run(broken.out, steps=4)  # it was not evaluated
    assert [problem for check in checks for problem in check.problems] == []
    assert sum("replayed" in check.what for check in checks) == 2


@pytest.mark.slow
def test_ranks_resume_a_run_in_another_way(scenes, tmp_path, without_tensorboard, ranks, on_ranks):
    """DDP for one step, then FSDP2 with two microbatches and checkpointed activations. Losses are those of one rank."""
    settings = {"precision": "fp32", "max_steps": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 0}
    one, more = tmp_path / "one", tmp_path / "more"
    pretrain(pretrain_config(scenes, one, **settings))
    interrupt(pretrain_config(scenes, more, **settings), 0)
    words = ("pretrain", "--config", more / "config.json", "--out", more, "--resume")
    ways = {"accumulate": 2, "checkpoint_activations": True, "parallel": "fsdp"}
    changes = ("--accumulate", 2, "--checkpoint-activations", "--parallel", "fsdp")
    assert on_ranks(ranks, *words)[0] == [0] * ranks
    shutil.rmtree(more / "checkpoints/step_00000002")
    codes, said = on_ranks(ranks, *words, *changes)
    assert codes == [0] * ranks, said
    (line,) = [line for line in said.splitlines() if "after step 1: " in line]
    assert all(f"{name} {value} in place of " in line for name, value in ways.items())
    for ours, theirs in zip(rows_of(more), rows_of(one), strict=True):
        assert ours["step"] == theirs["step"]
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-4)


@pytest.mark.slow
def test_resume_of_a_complete_run_changes_no_file(scenes, run_copy, caplog):
    before = folder_hash(run_copy)
    with caplog.at_level("INFO"):
        pretrain(pretrain_config(scenes, run_copy, checkpoint_every_steps=1, resume=True))
    assert "is complete: 2 of 2 steps" in caplog.text
    assert folder_hash(run_copy) == before


def test_resume_with_other_data_is_refused(run_copy, tmp_path):
    """The folder of the data may have moved; its contents must not have changed."""
    other = write_scenes(tmp_path / "other", {"train": 31})
    before = folder_hash(run_copy)
    with pytest.raises(DataError, match="wanted the data of the state, fingerprint"):
        pretrain(pretrain_config(other, run_copy, resume=True))
    assert folder_hash(run_copy) == before


@pytest.mark.slow
def test_resume_with_another_tokenizer_is_refused(scenes, tmp_path, train_split, without_tensorboard):
    """The file has the same name and other contents."""
    words = tmp_path / "words.json"
    tokenizer_for(train_split, 300).save(words)
    original = words.read_bytes()
    config = pretrain_config(scenes, tmp_path / "run", tokenizer=words, max_steps=1)
    pretrain(config)
    tokenizer_for(train_split, 280).save(words)
    before = folder_hash(config.out)
    own = f"{config.out}/checkpoints/step_00000001/tokenizer.json"
    with pytest.raises(RunError, match=rf"^{words}: wanted the tokenizer .* the run's is {own}: restore"):
        pretrain(replace(config, resume=True))
    assert folder_hash(config.out) == before
    words.write_bytes(original)
    pretrain(replace(config, resume=True))
    assert folder_hash(config.out) == before


@pytest.mark.slow
def test_resume_from_weights_that_are_not_finite_is_refused(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", ema_decay=0.9, max_steps=1)
    pretrain(config)
    for part in ("ema", "model"):
        folder = checkpoint(config.out, 1) / part
        change_tensors(folder, lambda name, t: t.fill_(torch.nan) if name == "log_scale" else t)
        reseal(config.out)
        before = folder_hash(config.out)
        with pytest.raises(RunError, match=rf"step_00000001/{part}: .* log_scale"):
            pretrain(replace(config, resume=True))
        assert folder_hash(config.out) == before
