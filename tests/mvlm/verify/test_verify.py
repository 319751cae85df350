"""Honest runs, which `mvlm verify` verifies: whole, resumed, of several parts; and its command."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mvlm.commands.evaluate import eval_retrieval
from mvlm.config.pretrain import PretrainConfig
from mvlm.runs.folder import read_metrics
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from mvlm.verify.verify import Replay, choose_segments, read_claims, threads, wrong_figures
from support.commands import assert_refused
from support.folders import folder_hash
from support.forgery import change_events, checkpoint, short_run


class Killed(BaseException):
    pass


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., None]:
    """Trains until `stop(trainer)` after a step, which may raise; begins anew or resumes."""

    def train(config: PretrainConfig, step: int, stop: Callable[[Trainer], None]) -> None:
        one_step = Trainer.one_step

        def until(trainer: Trainer, batches: Any) -> None:
            one_step(trainer, batches)
            if trainer.step == step:
                stop(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "one_step", until)
            pretrain(config)

    return train


def die(trainer: Trainer) -> None:
    raise Killed


def test_a_run_that_was_not_evaluated_is_given_the_command_for_it(bare_run, scenes):
    run = bare_run.rename(bare_run.with_name("a run"))
    claims = read_claims(run, scenes)
    [problem] = wrong_figures(claims, Replay(claims, "cpu"))
    wanted = ["mvlm", "eval", "retrieval", "--checkpoint", run, "--data", scenes, "--out", run / "eval/test.json"]
    assert shlex.split(problem.split("`")[1]) == list(map(str, wanted))


@pytest.mark.slow
def test_an_honest_run_is_verified_and_left_as_it_was(honest_run, run_mvlm):
    before = folder_hash(honest_run)
    torch.manual_seed(99)
    outcome = run_mvlm("verify", honest_run, "--steps", 6)
    assert [line[:3] for line in outcome.out[:-1]] == ["yes"] * 7  # three of hashes, three replayed, one of figures
    assert outcome.out[-1] == "verified"
    assert outcome.code == 0
    assert folder_hash(honest_run) == before


@pytest.mark.slow
def test_a_forged_run_is_not_verified(run, run_mvlm):
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "\n")
    (checkpoint(run, 2) / "state.json").write_text("{}")
    outcome = run_mvlm("verify", run)
    assert outcome.code == 1
    assert outcome.out[1] == "no   rows were added after the last checkpoint"
    assert "damaged, its sha256 is not the manifest's" in outcome.out[2]
    assert outcome.out[-1] == "not verified"
    assert not any("replayed" in line for line in outcome.out)


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed(scenes, tmp_path, interrupted, problems, without_tensorboard):
    """Killed in step 6, with averaged weights and Muon. Step 4, which is made twice, counts twice in the time."""
    config = short_run(scenes, tmp_path / "run", ema_decay=0.9, checkpoint_every_steps=3, optimizer="muon")
    with pytest.raises(Killed):
        interrupted(config, 6, die)
    lost = read_metrics(config.out / "metrics.jsonl")[-1]
    assert lost["step"] == 4
    pretrain(replace(config, resume=True))
    events = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    assert [f"{event['event']} {event['step']}" for event in events] == ["start 0", "save 3", "start 3", "save 6"]
    again = read_metrics(config.out / "metrics.jsonl")[3]
    assert again["step"] == 4
    assert again["seconds"] == pytest.approx(lost["seconds"] + 4 / again["pairs_per_s"])
    assert problems(config.out, steps=6) == []


@pytest.mark.slow
def test_a_run_that_lost_a_checkpoint_and_went_on_with_other_rows(
    scenes, tmp_path, interrupted, problems, without_tensorboard
):
    """The run's second part began at step 4, and the third went back behind it. It has a row every other step."""
    config = short_run(scenes, tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(Killed):
            interrupted(replace(config, resume=resume), 5, die)
    shutil.rmtree(checkpoint(config.out, 4))
    pretrain(replace(config, resume=True, log_every=2, checkpoint_every_steps=3))
    events = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    assert [f"{event['event']} {event['step']}" for event in events] == [
        "start 0", "save 2", "save 4", "start 4", "start 2", "save 3", "save 6",
    ]  # fmt: skip
    assert [row["step"] for row in read_metrics(config.out / "metrics.jsonl")] == [1, 2, 4, 6]
    assert problems(config.out, steps=6) == []


@pytest.mark.slow
def test_a_run_that_was_resumed_with_another_number_of_threads(
    scenes, tmp_path, interrupted, problems, without_tensorboard
):
    """Steps of both parts lie between two checkpoints; each is made again with the threads of its part."""
    config = short_run(scenes, tmp_path / "run", checkpoint_every_steps=6, keep_checkpoints=1)
    with threads(2):
        interrupted(config, 3, lambda trainer: setattr(trainer.stop, "reason", "a test"))
    with threads(1):
        pretrain(replace(config, resume=True))
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000006"]
    with threads(2):
        assert problems(config.out) == []


@pytest.mark.slow
def test_a_run_without_itm_whose_evaluation_re_ranks_nothing(scenes, tmp_path, problems, without_tensorboard):
    config = short_run(scenes, tmp_path / "run", itm_weight=0.0)
    pretrain(config)
    eval_retrieval(checkpoint=config.out, data=scenes, out=config.out / "eval/test.json", device="cpu")
    assert json.loads((config.out / "eval/test.json").read_text())["rerank"] == 0
    assert problems(config.out) == []


@pytest.mark.slow
def test_mistakes_are_one_line(run, run_mvlm, tmp_path):
    """A run of another kind of machine cannot be replayed: its bits differ. Hashes are compared before."""
    assert_refused(run_mvlm("verify", tmp_path / "none"), "wanted a run folder, found no such folder")
    assert_refused(run_mvlm("verify", run, "--data", tmp_path / "gone"), "gone: wanted a data folder")
    assert_refused(run_mvlm("verify", run, "--steps", -1), "steps: wanted at least 0, got -1")
    file, figures = run / "eval/test.json", json.loads((run / "eval/test.json").read_text())
    for change, message in (
        ({"rerank": -1}, "got another rerank"), ({"rerank": False}, "got another rerank"),
        ({"machine": {"threads": 0}}, "got another machine"), ({"precision": "fp8"}, "got another precision"),
        (None, "wanted the figures that"),
    ):  # fmt: skip
        file.write_text("[]" if change is None else json.dumps(figures | change))
        assert_refused(run_mvlm("verify", run), message)
    file.write_text(json.dumps(figures))
    change_events(run, lambda event: event.get("machine", {}).update(processor="another"))
    outcome = run_mvlm("verify", run)
    assert outcome.code == 2
    assert [line[:3] for line in outcome.out] == ["yes"] * 3
    assert outcome.err[-1].startswith("mvlm: steps 5 to 6: wanted the processor another, found ")
    checkpoint(run, 6).rename(run / "moved")
    assert_refused(run_mvlm("verify", run), "wanted a finished run, a checkpoint of step 6, found step 4", "--resume")
    (run / "history.jsonl").unlink()
    assert_refused(run_mvlm("verify", run), "history.jsonl: wanted the history of the run, found no such file")


def test_segments_lie_between_checkpoints_and_the_last_is_always_replayed():
    assert choose_segments([40, 80, 120], 0) == [(80, 120)]
    assert choose_segments([40, 80, 120], 500) == [(0, 40), (40, 80), (80, 120)]
    assert choose_segments([550], 0) == [(0, 550)]
    drawn = {tuple(choose_segments([40, 80, 120], 1)) for _ in range(200)}
    assert drawn == {((80, 120),), ((0, 40), (80, 120)), ((40, 80), (80, 120))}
