"""Rows of metrics: times and rates that follow from the steps alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvlm.distributed.world import World
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
