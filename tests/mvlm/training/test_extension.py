"""Schedules of the learning rate, and runs that go on behind their end or to a later one."""

import json
import math

import pytest

from mvlm.errors import ConfigError
from mvlm.training.optimizer import learning_rate_factor
from mvlm.training.run import pretrain
from mvlm.verify.verify import verify_run
from support.folders import LOSSES, checkpoint_contents, reproducible_rows, rows_of
from support.models import pretrain_config
from support.resumes import interrupt


def tensors(run, step):
    found = checkpoint_contents(run / f"checkpoints/step_{step:08d}")
    return {name: value for name, value in found.items() if "/" in name}


def factors(tmp_path, **settings):
    config = pretrain_config(tmp_path, tmp_path / "run", **settings)
    return [learning_rate_factor(step, config) for step in range(config.max_steps)]


def test_wsd_stays_at_its_peak_and_falls_by_the_root(tmp_path):
    found = factors(tmp_path, schedule="wsd", max_steps=20, warmup_steps=4, cooldown_steps=5, lr_end=0.2)
    falls = [0.2 + 0.8 * (1 - math.sqrt(k / 5)) for k in range(5)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *[1.0] * 11, *falls])
    fifth = factors(tmp_path, schedule="wsd", max_steps=20, warmup_steps=4, lr_end=0.2)
    assert (fifth[16], sum(factor == 1 for factor in fifth)) == (1.0, 14)
    assert factors(tmp_path, schedule="wsd", max_steps=9, warmup_steps=0, cooldown_steps=0) == [1.0] * 9


def test_a_cosine_rises_again_behind_its_old_end(tmp_path):
    settings = {"warmup_steps": 2, "lr_end": 0.1}
    found = factors(tmp_path, max_steps=16, extensions=(6,), **settings)
    assert found[:6] == factors(tmp_path, max_steps=6, **settings)
    assert found[6:8] == pytest.approx([0.55, 1.0])
    assert found[8:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_complete_run_goes_on_and_resumes_exactly(scenes, tmp_path, without_tensorboard, schedule, caplog):
    """It keeps its moments, is the same after an interruption, and `mvlm verify` makes it again."""
    settings = {"schedule": schedule, "cooldown_steps": 2, "checkpoint_every_steps": 2, "keep_checkpoints": 0}
    outs = [tmp_path / name for name in ("whole", "broken")]
    for out in outs:
        pretrain(pretrain_config(scenes, out, max_steps=4, **settings))
    before = reproducible_rows(outs[0])
    whole, broken = (pretrain_config(scenes, out, max_steps=4, extend_to=8, resume=True, **settings) for out in outs)
    with caplog.at_level("INFO"):
        pretrain(whole)
    said = [text for text in caplog.messages if "goes on to step 8" in text]
    assert len(said) == 1
    assert "rises again to its peak in steps 5 to 6" in said[0]
    interrupt(broken, 7)
    pretrain(broken)
    rows = reproducible_rows(outs[0])
    assert rows[:4] == before
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["lr"] / 2e-3 for row in rows[4:6]] == pytest.approx([0.55, 1.0])
    assert reproducible_rows(outs[1]) == rows
    assert tensors(outs[0], 8) == tensors(outs[1], 8)
    config = json.loads((outs[0] / "config.json").read_text())
    assert (config["max_steps"], config["extensions"]) == (8, [4])
    *checks, _ = verify_run(outs[0], steps=8)
    assert [problem for check in checks for problem in check.problems] == []


@pytest.mark.slow
def test_wsd_extended_before_it_falls_is_the_longer_run(scenes, tmp_path, without_tensorboard):
    settings = {"schedule": "wsd", "cooldown_steps": 2, "checkpoint_every_steps": 2}
    long, short = tmp_path / "long", tmp_path / "short"
    pretrain(pretrain_config(scenes, long, max_steps=8, **settings))
    interrupt(pretrain_config(scenes, short, max_steps=6, **settings), 4)
    pretrain(pretrain_config(scenes, short, max_steps=6, extend_to=8, resume=True, **settings))
    assert reproducible_rows(short) == reproducible_rows(long)
    assert tensors(short, 8) == tensors(long, 8)
    assert json.loads((short / "config.json").read_text())["extensions"] == []


@pytest.mark.slow
def test_ranks_extend_a_run_as_one_does(scenes, tmp_path, without_tensorboard, ranks, on_ranks):
    one, more = tmp_path / "one", tmp_path / "more"
    for out in (one, more):
        pretrain(pretrain_config(scenes, out, max_steps=2, precision="fp32"))
    pretrain(pretrain_config(scenes, one, max_steps=2, precision="fp32", extend_to=4, resume=True))
    words = ("pretrain", "--config", more / "config.json", "--out", more, "--resume", "--extend-to", 4)
    codes, said = on_ranks(ranks, *words)
    assert codes == [0] * ranks, said
    for ours, theirs in zip(rows_of(more), rows_of(one), strict=True):
        assert ours["lr"] == theirs["lr"]
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{"extend_to": 1}, {"extend_to": 9, "resume": False}, {"extend_to": 9, "max_steps": 5}], ids=str
)
def test_an_extension_of_no_such_run_is_refused(scenes, run_copy, changes):
    before = (run_copy / "config.json").read_text()
    with pytest.raises(ConfigError, match="extend_to"):
        pretrain(pretrain_config(scenes, run_copy, checkpoint_every_steps=1, **({"resume": True} | changes)))
    assert (run_copy / "config.json").read_text() == before


def test_ends_that_do_not_ascend_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="extensions"):
        pretrain_config(tmp_path, tmp_path / "run", max_steps=8, extensions=(6, 5))
