"""The training loop against the bare step: a short real run, and the arithmetic of its figures."""

import csv
import json
import time

import pytest

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.training.trainer import Trainer
from mvlm_benchmarks.run import run as bench
from mvlm_benchmarks.run.run import make_rows
from mvlm_benchmarks.run.turns import LOOP, NO_LOADER, STEP, Turns
from mvlm_benchmarks.run.usage import GROUPS
from support.shapes import copy_shapes

SIZES = {"image_layers": 1, "text_layers": 1, "cross_layers": 1, "decoder_layers": 1, "width": 24, "heads": 2}


RECIPE = PretrainConfig.preset


def small(preset, data, out):
    """The recipe with a small model and batch."""
    model = MaskVLMConfig.preset(preset, **SIZES)
    return RECIPE(preset, data=data, out=out, batch_size=4, model=model, precision="fp32")


def figures(seconds: float, cpu: float) -> dict[str, float]:
    groups = {f"cpu_{group}_s": cpu / 4 for group in GROUPS}
    return {"seconds": seconds, "cpu_s": cpu, **groups, "page_faults": 10.0, "switches": 2.0}


def test_rows_compare_each_round_with_its_own_bare_step(tmp_path):
    turns = {
        STEP: [figures(1.0, 2.0), figures(2.0, 2.0), figures(1.0, 2.0)],
        NO_LOADER: [figures(1.25, 2.5), figures(2.5, 2.5), figures(1.25, 2.5)],
        LOOP: [figures(2.0, 4.0), figures(4.0, 4.0), figures(2.0, 4.0)],
    }
    config = small("tiny", tmp_path, tmp_path / "run")
    rare = {"evaluation_s": 50.0, "checkpoint_s": 60.0, "evaluation_cpu_s": 80.0, "checkpoint_cpu_s": 30.0}
    rows = make_rows(turns, rare, config, eval_every_steps=100)
    assert [row["contender"] for row in rows] == ["step", "run, no loader", "run, no evaluation", "run"]
    assert [row["over_step"] for row in rows[:3]] == pytest.approx([1, 0.8, 0.5])
    assert [row["cpu_over_step"] for row in rows[:3]] == pytest.approx([1, 0.8, 0.5])
    assert [row["pairs_per_s"] for row in rows[:3]] == pytest.approx([4, 3.2, 2])
    # A checkpoint takes 60 s of every 10 minutes, and an evaluation 50 s of every 100 steps.
    by_hand = sorted([1 / (2 * 1.1 + 0.5), 2 / (4 * 1.1 + 0.5), 1 / (2 * 1.1 + 0.5)])
    assert rows[3]["over_step"] == pytest.approx(by_hand[1])
    # Processor time: 4 s of the loop, 2 s / 600 s of a checkpoint's 30 s, and 80 s / 100 of an evaluation.
    assert rows[3]["cpu_over_step"] == pytest.approx(2 / (4 + 0.1 + 0.8))
    assert rows[3]["over_step_low"] <= rows[3]["over_step"] <= rows[3]["over_step_high"]


@pytest.mark.slow
def test_a_run_is_measured_in_turns(tmp_path, monkeypatch, without_tensorboard, capsys):
    """A slower loop lowers its ratio and not the bare step's; the loop sees the batches of an ordinary run."""
    monkeypatch.setattr(PretrainConfig, "preset", small)
    one_step, seen = Trainer.one_step, []

    def slow(trainer, batches):
        one_step(trainer, batches)
        seen.append(tuple(trainer.metrics.samples[-1]))
        time.sleep(0.3)

    monkeypatch.setattr(Trainer, "one_step", slow)
    files = {"json": tmp_path / "run.json", "csv": tmp_path / "run.csv"}
    result = bench.run("tiny", copy_shapes(tmp_path / "data"), 2, 3, eval_every_steps=50, threads=1, **files)
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["step"]["over_step"] == 1
    for name in ("run, no loader", "run, no evaluation"):
        assert rows[name]["seconds"] > rows["step"]["seconds"] + 0.2
        assert rows[name]["over_step"] < 1
    assert rows["step"]["cpu_loader_s"] < rows["run, no evaluation"]["cpu_loader_s"]
    assert rows["run"]["seconds"] == pytest.approx(
        rows["run, no evaluation"]["seconds"] * (1 + result["checkpoint_s"] / 600) + result["evaluation_s"] / 50
    )
    assert result["run_over_step"] == rows["run"]["over_step"]
    # Three rounds with the one that does not count, of two turns of the loop, of two and three steps; and a last one.
    assert len(seen) == Turns((), 3, 2).steps == 31
    # The loop without the loader repeats batches that the loop with the loader has had.
    assert len(set(seen)) == 3 * (2 + 3) + 1
    assert json.loads(files["json"].read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    with files["csv"].open() as file:
        written = list(csv.DictReader(file))
    assert [row["contender"] for row in written] == list(rows)
    assert "run, no loader" in capsys.readouterr().out
