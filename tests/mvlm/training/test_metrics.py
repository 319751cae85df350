"""Rows of metrics; and skipped updates: which, how they are counted, and that they change no weight and no moment."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvlm.errors import NonFiniteLossError
from mvlm.model import fast
from mvlm.tasks.load import load_model
from mvlm.training.metrics import MetricsBuffer, MetricsLogger, SkippedUpdates, finite_update
from mvlm.training.run import pretrain
from support.folders import checkpoint_contents, rows_of
from support.models import ALONE, pretrain_config


def test_a_figure_that_is_not_finite_is_null() -> None:
    """An evaluation of weights that overflow in the forward pass, just when updates are skipped."""
    rows: list[dict[str, Any]] = []
    logger = MetricsLogger(pretrain_config(Path(), Path()), ALONE, lambda buffer: 0, rows.append)
    read = [{"total": 1.0, "good": 1.0, "itc": math.inf}]
    buffer: Any = SimpleNamespace(steps=[1], waited=0.0, tokens=20, send=lambda: None, read=lambda: read)
    logger.end_row(buffer, 0, {"masked_nats": math.nan, "tr_r1": 5.0, "ir_r1": math.inf, "gain_text_nats": math.nan})
    logger.write_row(SimpleNamespace(show=lambda row, losses: None))  # pyright: ignore[reportArgumentType]
    (row,) = rows
    assert [row[name] for name in ("itc", "masked_nats", "tr_r1", "ir_r1")] == [None, None, 5.0, None]


NAN, INF = math.nan, math.inf


def judge(loss: float, norm: float = 1.0) -> bool:
    return bool(finite_update(torch.tensor(loss), torch.tensor(norm)))


def test_guard_never_passes_what_is_not_finite():
    for loss, norm in ((1.0, NAN), (NAN, 1.0), (INF, 1.0), (1.0, INF), (-INF, 1.0)):
        assert not judge(loss, norm)
    assert judge(1.0)
    assert judge(1e30, 1e30)


def buffer_of(good: list[bool], first: int = 1, loss: float = NAN) -> MetricsBuffer:
    buffer = MetricsBuffer()
    for step, is_good in enumerate(good, first):
        values = {"mim": 1.0, "total": 1.0 if is_good else loss, "grad_norm": 2.0, "good": float(is_good)}
        buffer.add(step, [step, 100 + step], 12, {name: torch.tensor(value) for name, value in values.items()}, 0.0)
    return buffer


def test_skipped_updates_are_counted_once_and_limited_in_a_row():
    skipped = SkippedUpdates(limit=2)
    first = buffer_of([True, False, False, True, False])
    assert skipped.count(first) is None
    assert skipped.count(first) is None  # a checkpoint counts before the row is closed
    assert (skipped.total, skipped.in_a_row) == (3, 1)
    again = SkippedUpdates(limit=2)
    again.load(json.loads(json.dumps(skipped.state())))
    for count in (skipped, again):
        past = count.count(buffer_of([False, False, False], first=6))
        assert past is not None
        step, row, samples = past
        assert (step, samples, row["mim"]) == (7, [7, 107], 1.0)
        assert (count.total, count.in_a_row) == (5, 3)


@pytest.fixture
def poison(monkeypatch):
    """Function that makes the masked-image loss NaN at the calls with the given numbers, from 1."""

    def at(*calls: int) -> None:
        loss, made = fast.masked_pixel_loss, []

        def broken(*inputs, **settings):
            made.append(1)
            return loss(*inputs, **settings) * (NAN if len(made) in calls else 1)

        monkeypatch.setattr(fast, "masked_pixel_loss", broken)

    return at


@pytest.mark.slow
def test_skipped_update_changes_no_weight_and_the_run_continues(scenes, tmp_path, without_tensorboard, poison):
    """Two updates of four are skipped. The checkpoints around them have the same weights and moments."""
    poison(2, 3)
    config = pretrain_config(
        scenes, tmp_path / "run", max_steps=4, checkpoint_every_steps=1, keep_checkpoints=4, max_bad_steps=2
    )
    pretrain(config)
    rows = rows_of(config.out)
    assert [row["bad_steps"] for row in rows] == [0, 1, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, True, False]
    assert [row["mim"] is None for row in rows] == [False, True, True, False]
    assert all(row["mlm"] is not None for row in rows)
    states = [checkpoint_contents(config.out / f"checkpoints/step_{step:08d}") for step in (1, 2, 3, 4)]
    tensors = [{k: v for k, v in s.items() if k.startswith(("model/", "optimizer/"))} for s in states]
    assert tensors[0] == tensors[1] == tensors[2] != tensors[3]
    assert tensors[0].keys() == tensors[3].keys()


@pytest.mark.slow
def test_too_many_skipped_updates_stop_the_run_with_a_diagnosis(scenes, tmp_path, without_tensorboard, poison):
    """The error names objective, samples and checkpoint, whose weights are finite."""
    poison(*range(3, 100))
    config = pretrain_config(
        scenes, tmp_path / "run", max_steps=9, checkpoint_every_steps=2, max_bad_steps=1, log_every=4
    )
    with pytest.raises(NonFiniteLossError) as caught:
        pretrain(config)
    message = str(caught.value)
    assert message.startswith("step 4: mim is nan, grad_norm is nan")
    assert f"{config.out}/checkpoints/step_00000002" in message
    keys = message.split("Its samples: ")[1].split(". Last")[0].split(", ")
    assert len(set(keys)) == config.batch_size
    model = load_model(config.out).network
    assert all(p.isfinite().all() for p in model.parameters())
