"""Honest runs, which `mvlm verify` verifies: whole, resumed, from another machine; and its command."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from mvlm.commands.evaluate import eval_retrieval
from mvlm.errors import RunError
from mvlm.runs.folder import read_metrics
from mvlm.speedrun import replay, tracks, verify
from mvlm.speedrun.bounds import compare_figures
from mvlm.speedrun.claims import read_claims
from mvlm.speedrun.replay import Segment, not_begun, plan_segments
from mvlm.speedrun.tracks import Track, check_track
from mvlm.speedrun.verify import verify_run
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from mvlm_dataloading import open_dataset
from support.commands import assert_refused
from support.folders import folder_hash
from support.forgery import change_events, checkpoint, short_run


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_an_honest_run_is_verified_and_left_as_it_was(honest_run, run_mvlm):
    before = folder_hash(honest_run)
    torch.manual_seed(99)
    outcome = run_mvlm("verify", honest_run, "--steps", 6, "--seed", 5)
    words = [line.split()[:2] for line in outcome.out]
    assert words == [
        *(["yes", name] for name in ("data", "history", "metrics", "checkpoints", "replay", "replay", "replay")),
        ["yes", "evaluation"],
        ["verified", "(--seed"],
    ]
    assert outcome.out[4].startswith("yes  replay       steps 1 to 2: rows and weights are equal bit for bit")
    assert "steps 5 to 6: rows and the final weights are equal bit for bit" in outcome.out[6]
    assert "figures on the test split are equal" in outcome.out[7]
    assert outcome.code == 0
    assert folder_hash(honest_run) == before


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed(scenes, tmp_path, monkeypatch, without_tensorboard):
    """Killed in step 6, with averaged weights. Step 4, which is made twice, counts twice in the time."""
    config = short_run(scenes, tmp_path / "run", ema_decay=0.9, checkpoint_every_steps=3)
    one_step = Trainer.one_step

    def die(trainer, batches):
        one_step(trainer, batches)
        if trainer.step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", die)
        with pytest.raises(Killed):
            pretrain(config)
    lost = read_metrics(config.out / "metrics.jsonl")[-1]
    assert lost["step"] == 4
    pretrain(replace(config, resume=True))
    events = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    assert [f"{event['event']} {event['step']}" for event in events] == ["start 0", "save 3", "start 3", "save 6"]
    again = read_metrics(config.out / "metrics.jsonl")[3]
    assert again["step"] == 4
    assert again["seconds"] == pytest.approx(lost["seconds"] + 4 / again["pairs_per_s"])
    checks = verify_run(config.out, steps=6, seed=0).checks
    assert [check.name for check in checks if not check.passed] == ["evaluation"]
    assert checks[1].text.startswith("2 parts by commit ")
    assert checks[-1].text.startswith(f"no {config.out}/eval/test.json: run `mvlm eval retrieval")


@pytest.mark.slow
def test_a_run_that_lost_a_checkpoint_and_went_on_with_other_rows(scenes, tmp_path, monkeypatch, without_tensorboard):
    """Its second part began at step 4, which the third one went back behind. Then it has a row every other step."""
    config = short_run(scenes, tmp_path / "run")
    one_step = Trainer.one_step

    def die(trainer, batches):
        one_step(trainer, batches)
        if trainer.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", die)
        for resume in (False, True):
            with pytest.raises(Killed):
                pretrain(replace(config, resume=resume))
    shutil.rmtree(checkpoint(config.out, 4))
    pretrain(replace(config, resume=True, log_every=2, checkpoint_every_steps=3))
    events = [json.loads(line) for line in (config.out / "history.jsonl").read_text().splitlines()]
    assert [f"{event['event']} {event['step']}" for event in events] == [
        "start 0", "save 2", "save 4", "start 4", "start 2", "save 3", "save 6",
    ]  # fmt: skip
    assert [row["step"] for row in read_metrics(config.out / "metrics.jsonl")] == [1, 2, 4, 6]
    checks = verify_run(config.out, steps=6, seed=0).checks
    assert [(check.name, check.text) for check in checks if not check.passed and check.name != "evaluation"] == []


@pytest.mark.slow
def test_a_run_that_was_resumed_with_another_number_of_threads(scenes, tmp_path, monkeypatch, without_tensorboard):
    """Steps of both parts lie between two checkpoints; each is made again with the threads of its part."""
    config = short_run(scenes, tmp_path / "run", checkpoint_every_steps=6, keep_every_steps=0, keep_checkpoints=1)
    one_step = Trainer.one_step

    def stop(trainer, batches):
        one_step(trainer, batches)
        if trainer.step == 3:
            trainer.stop.reason = "a test"

    with monkeypatch.context() as patch, replay.threads(2):
        patch.setattr(Trainer, "one_step", stop)
        pretrain(config)
    with replay.threads(1):
        pretrain(replace(config, resume=True))
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000006"]
    with replay.threads(2):
        checks = verify_run(config.out, steps=6, seed=0).checks
    assert [check.text for check in checks if check.name == "replay"] != []
    assert [check.text for check in checks if check.passed is False and check.name != "evaluation"] == []
    assert "equal bit for bit" in next(check.text for check in checks if check.name == "replay")


@pytest.mark.slow
def test_a_run_without_itm_whose_evaluation_re_ranks_nothing(scenes, tmp_path, without_tensorboard):
    config = short_run(scenes, tmp_path / "run", itm_weight=0.0)
    pretrain(config)
    eval_retrieval(checkpoint=config.out, data=scenes, out=config.out / "eval/test.json", device="cpu")
    assert json.loads((config.out / "eval/test.json").read_text())["rerank"] == 0
    found = verify_run(config.out, steps=0, seed=0)
    assert [str(check) for check in found.checks if check.passed is False] == []
    assert found.figures["tr"]["r1"] == found.figures["itc"]["tr"]["r1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"rerank": -1},
        {"rerank": False},
        {"rerank": "many"},
        {"machine": 3},
        {"machine": {"threads": 0}},
        {"precision": "fp8"},
    ],
)
def test_figures_that_no_evaluation_writes_are_an_error_of_one_line(run, change):
    file = run / "eval/test.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RunError, match=f"wanted the figures of `mvlm eval retrieval`, got {next(iter(change))}"):
        read_claims(run, None)


@pytest.mark.slow
def test_a_checkpoint_whose_next_row_is_out_of_reach_is_a_no(scenes, tmp_path, without_tensorboard):
    """One row, of step 6, and checkpoints of 4 and 6. The last segment alone would not say where step 4 came from."""
    config = short_run(scenes, tmp_path / "run", log_every=6, checkpoint_every_steps=4)
    pretrain(config)

    def refused(reach: int) -> list[str]:
        checks = verify_run(config.out, steps=6, reach=reach, seed=0).checks
        return [check.text for check in checks if check.passed is False and check.name == "replay"]

    assert refused(2) == ["no row or checkpoint follows step 0 within 2 steps; raise --reach"]
    assert refused(4) == []


def test_checkpoints_that_no_replay_begins_at_are_named():
    def text(kept: list[int], rows: Sequence[int], reach: int) -> str:
        check = not_begun(plan_segments(kept, rows, 3, reach, Random(0)), kept, reach)
        assert check is None or check.passed is False
        return check.text if check else ""

    assert text([200, 400, 440], range(100, 441, 100), 64) == (
        "no row or checkpoint follows steps 0, 200 within 64 steps; raise --reach"
    )
    assert "steps 0, 200, 400 and more within" in text([200, 400, 600, 800], (800,), 64)
    assert text([200, 400, 440], range(100, 441, 100), 100) == ""
    assert text([550], range(1, 551), 64) == ""  # the demo's, whose last segment is refused for its length


@pytest.mark.slow
def test_a_run_of_another_kind_of_machine(run):
    change_events(run, lambda event: event.get("machine", {}).update(processor="another"))
    found = verify_run(run, steps=6, seed=0)
    assert found.verified
    texts = [check.text for check in found.checks if check.name == "replay"]
    assert len(texts) == 3
    assert all(" agree as on another kind of machine, in fp32: losses differ by at most 0" in text for text in texts)
    assert "rows and the final weights agree" in texts[-1]


@pytest.mark.slow
def test_a_record(run, scenes, tmp_path, monkeypatch, run_mvlm):
    """A verified run that meets the rules and reaches the targets becomes a record; no other does."""
    data = {split: open_dataset(scenes, split).fingerprint for split in ("train", "validation", "test")}
    easy = Track(machine="any", cores=1 << 20, data=data, targets={"tr.r10": 0.0, "gain_pixels_pct": -100.0})
    monkeypatch.setattr(tracks, "TRACKS", {"easy": easy})
    monkeypatch.setattr(verify, "flops_per_pair", lambda config, tokens: 1e6 if 3 < tokens < 12 else 0.0)
    change_events(run, lambda event: event.update(commit="abc") if "commit" in event else None)
    words = ("verify", run, "--steps", 0, "--track", "easy")
    assert run_mvlm(*words, "--record", tmp_path / "record.json").code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["track"] == "easy"
    assert record["parts"][0]["commit"] == "abc"
    assert record["seconds"] == pytest.approx(read_metrics(run / "metrics.jsonl")[-1]["seconds"], abs=0.051)
    assert record["flops"] == 1e6 * 4 * 6
    assert [line.split(",")[0] for line in record["log"]] == ["step", "1", "2", "3", "4", "5", "6"]
    assert record["figures"]["n_images"] == 8
    assert "out" not in record["settings"]

    monkeypatch.setattr(tracks, "TRACKS", {"easy": replace(easy, targets={"tr.r1": 101.0})})
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "\n")
    (checkpoint(run, 2) / "state.json").write_text("{}")
    outcome = run_mvlm(*words, "--record", tmp_path / "none.json", "--json", tmp_path / "verdict.json")
    assert outcome.code == 1
    assert not (tmp_path / "none.json").exists()
    assert [line.split()[:2] for line in outcome.out][-3:-1] == [["no", "checkpoints"], ["-", "replay"]]
    assert json.loads((tmp_path / "verdict.json").read_text())["verified"] is False


RULES = Track(machine="one core", cores=1, data={}, targets={"tr.r1": 40.0, "gain_text_nats": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine, commit, settings, text",
    [
        ({}, "abc", {}, ""),
        ({}, "abc-dirty", {}, "wanted a committed revision of the code, found abc-dirty"),
        ({}, "", {}, "wanted a committed revision of the code, found none"),
        ({"cores": 2}, "abc", {}, "wanted one core, found 2 cores, device cpu"),
        ({"ranks": 2}, "abc", {}, "wanted one core and one process, found 2 ranks"),
        ({"device": "NVIDIA H100"}, "abc", {}, "wanted one core, found 1 cores, device NVIDIA H100"),
        ({}, "abc", {"image_weights": "w"}, "wanted a start from random weights, found pretrained ones"),
        ({}, "abc", {"initial_model": "m"}, "wanted a start from random weights, found pretrained ones"),
        ({}, "abc", {"tokenizer": "t"}, "wanted a tokenizer made from the training captions, found a file"),
        ({}, "abc", {"log_every": 2}, "wanted a row of every step, found one every 2 steps"),
        ({}, "abc", {"resumed with": 64}, "wanted a row of every step, found one every 64 steps"),
    ],
)
def test_rules_of_a_track(honest_run, machine, commit, settings, text):
    claims = read_claims(honest_run, None)
    part = claims.parts[0] | {"commit": commit, "machine": {"device": "cpu", "cores": 1, "ranks": 1} | machine}
    part["log_every"] = settings.get("log_every", 1)
    resumed = [part | {"log_every": settings.pop("resumed with")}] if "resumed with" in settings else []
    claims = replace(claims, parts=[part, *resumed], config=replace(claims.config, **settings))
    rules, targets = check_track(claims, RULES, {"tr": {"r1": 40.0}, "gain_text_nats": 0.51})
    assert (rules.passed, targets.passed) == (not text, True)
    assert text in rules.text


@pytest.mark.slow
def test_a_tokenizer_that_is_stored_with_the_data_breaks_a_rule(honest_run, scenes_copy):
    """It may be made from other captions than those of training. Fingerprints of splits do not cover it."""
    claims = read_claims(honest_run, scenes_copy)
    found = "wanted a tokenizer made from the training captions, found one stored with the data"
    assert found not in check_track(claims, RULES, {})[0].text
    fingerprint = open_dataset(scenes_copy, "train").fingerprint
    file = scenes_copy / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "0" * 64}))
    assert open_dataset(scenes_copy, "train").fingerprint == fingerprint
    assert found in check_track(claims, RULES, {})[0].text


@pytest.mark.slow
def test_targets_and_distances_of_checkpoints(honest_run):
    claims = read_claims(honest_run, None)
    claims = replace(claims, kept=[*claims.kept, Path("step_00000071")], figures={"rerank": 413})
    rules, targets = check_track(claims, RULES, {"tr": {"r1": 39.9}})
    assert "wanted checkpoints at most 64 steps apart, found two with 65 steps between" in rules.text
    assert "wanted an evaluation with --rerank 32, found 413" in rules.text
    assert targets.text == "tr.r1 is 39.90, wanted 40; gain_text_nats is -inf, wanted 0.5"
    assert not targets.passed
    gpu = Track(machine="one GPU", gpu="H100", data={"test": "1234"}, targets={})
    texts = check_track(claims, gpu, {})[0].text
    assert "test: wanted the fingerprint 1234, found" in texts


@pytest.mark.slow
def test_mistakes_are_one_line(run, run_mvlm, tmp_path):
    assert_refused(run_mvlm("verify", tmp_path / "none"), "wanted the folder of a finished run, found no such folder")
    assert_refused(run_mvlm("verify", run, "--data", tmp_path / "gone"), "gone: wanted a data folder, found none")
    assert_refused(run_mvlm("verify", run, "--record", tmp_path / "r"), "record: wanted --track too")
    for content in (b"an image", b"5", b'["verified", "track"]'):
        (tmp_path / "other").write_bytes(content)
        for flag in ("--json", "--record"):
            outcome = run_mvlm("verify", run, "--track", "two-cores", flag, tmp_path / "other")
            assert_refused(outcome, f"{flag[2:]}: wanted a new file or an earlier")
    for flag in ("--json", "--record"):
        words = ("--track", "two-cores", flag)
        assert_refused(run_mvlm("verify", run, *words, tmp_path), f"{flag[2:]}: wanted a new file, got {tmp_path}")
        assert_refused(run_mvlm("verify", run, *words, run / "config.json"), "wanted a new file, got", "config.json")
    assert_refused(run_mvlm("verify", run, "--track", "x"), "track: wanted two-cores or one-h100, got 'x'")
    checkpoint(run, 6).rename(run / "moved")
    assert_refused(run_mvlm("verify", run), "wanted a finished run, a checkpoint of step 6, found step 4", "--resume")
    (run / "history.jsonl").unlink()
    assert_refused(run_mvlm("verify", run), "history.jsonl: wanted the history of the run, found no such file")


def test_counts_are_equal_within_any_bound():
    figures = {"n_images": 413, "n_texts": 554, "reranked": 32, "gain_text_nats": 0.5}
    other = {"n_images": 415, "n_texts": 553, "reranked": 30, "gain_text_nats": 0.51}
    found = compare_figures(figures, other, 2.0)
    assert found == ["n_images is 413, found 415", "n_texts is 554, found 553", "reranked is 32, found 30"]
    assert compare_figures({"masked_l1": None}, {"masked_l1": math.nan}, 2.0) == []


def test_steps_are_replayed_from_the_nearest_checkpoint_and_within_reach():
    def plan(steps: int, reach: int, kept: Sequence[int] = (40, 80, 120), rows: Sequence[int] = range(1, 121)):
        return [(s.start, s.stop) for s in plan_segments(kept, rows, steps, reach, Random(0))]

    assert plan(0, 40) == [(0, 1), (40, 41), (80, 120)]
    assert plan(120, 40) == [(0, 40), (40, 80), (80, 120)]
    assert plan(1, 40) in ([(0, 40), (40, 41), (80, 120)], [(0, 1), (40, 80), (80, 120)], plan(0, 40))
    # The last segment is longer than the reach, so only its beginning can be replayed.
    assert plan(120, 30) == [(0, 30), (40, 70), (80, 110)]
    # With a row every ten steps a replay goes on to the next row, if that is within reach.
    assert plan(0, 40, rows=range(10, 121, 10)) == [(0, 10), (40, 50), (80, 120)]
    assert plan(0, 5, rows=range(10, 121, 10)) == []
    # A drawn step is never dropped: of these steps, only those up to 30 have a row or a checkpoint within reach.
    assert all(plan(1, 30, (100,), (30, 60, 90)) == [(0, 30)] for _ in range(20))
    # A checkpoint ends a replay where rows are sparse.
    assert plan(100, 40, (40, 60), (45,)) == [(0, 40), (40, 60)]
    assert plan_segments([600, 640], range(1, 641), 0, 64, Random(0)) == [Segment(0, 1), Segment(600, 640)]
