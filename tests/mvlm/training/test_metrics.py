"""Rows of metrics: times and rates that follow from the steps alone."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.progress import describe_row
from mvlm.training import metrics
from mvlm.training.metrics import MetricsLogger
from support.models import pretrain_config

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_the_count_of_flops_is_in_no_rows_time(monkeypatch):
    """It takes five seconds at the first row here. Every row has one step, which takes two."""
    rows: list[dict[str, Any]] = []
    config, clock = pretrain_config(Path(), Path(), batch_size=4, max_steps=9), [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    counted = []

    def of_rate(*_: Any) -> float:
        clock[0] += 0 if counted else 5
        counted.append(1)
        return 0.5

    monkeypatch.setattr(metrics, "ModelFlopsUtilization", lambda *_: SimpleNamespace(of_rate=of_rate))
    sinks: Any = SimpleNamespace(seconds=10.0, log=rows.append)
    logger = MetricsLogger(config, ALONE, sinks, lambda buffer: 0)
    figures = {"total": 1.0, "good": 1.0}
    for step in (1, 2, 3):
        clock[0] += 2
        buffer: Any = SimpleNamespace(
            steps=[step], waited=0.0, tokens=20, send=lambda: None, read=lambda: [dict(figures)]
        )
        logger.end_row(buffer, 0, {})
        progress: Any = SimpleNamespace(show=lambda row: None)
        logger.write_row(progress)
    assert [row["pairs_per_s"] for row in rows] == [2.0, 2.0, 2.0]
    assert [row["seconds"] for row in rows] == pytest.approx([12.0, 14.0, 16.0])
    assert [row["mfu"] for row in rows] == [0.5] * 3


def test_a_figure_that_is_not_finite_is_null() -> None:
    """An evaluation of weights that overflow in the forward pass, just when updates are skipped."""
    rows: list[dict[str, Any]] = []
    sinks: Any = SimpleNamespace(seconds=0.0, log=rows.append)
    logger = MetricsLogger(pretrain_config(Path(), Path()), ALONE, sinks, lambda buffer: 0)
    read = [{"total": 1.0, "good": 1.0, "itc": math.inf}]
    buffer: Any = SimpleNamespace(steps=[1], waited=0.0, tokens=20, send=lambda: None, read=lambda: read)
    logger.end_row(buffer, 0, {"masked_nats": math.nan, "tr_r1": 5.0, "ir_r1": math.inf, "gain_text_nats": math.nan})
    progress: Any = SimpleNamespace(show=lambda row: None)
    logger.write_row(progress)
    (row,) = rows
    assert [row[name] for name in ("itc", "masked_nats", "tr_r1", "ir_r1")] == [None, None, 5.0, None]
    line = describe_row(row | {"gain_pixels_pct": None})
    assert line.endswith("validation R@1 5.0 / -  gain - nats, - %")
