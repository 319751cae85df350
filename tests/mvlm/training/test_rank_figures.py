"""Slow ranks: figures of all ranks in the rows of metrics, and a warning that names a rank."""

import logging
import os
import sys
import time

import pytest

from mvlm.model import fast
from mvlm.training import rank_figures
from mvlm.training.rank_figures import FIELDS, SLOW_STEPS, RankFigures
from mvlm.training.run import pretrain
from mvlm_dataloading.loader.batches import Prefetcher
from support.faults.forks import ended_well, in_ranks
from support.folders import rows_of
from support.models import pretrain_config

PAUSE_S = 0.3


def steps_of(number: int, *by_rank: tuple[float, float, float]) -> list[list[list[float]]]:
    return [[list(figures) for figures in by_rank]] * number


def test_a_row_has_least_median_and_largest_of_all_ranks():
    figures = RankFigures(["a", "a", "b", "b"])
    by_rank = [(0.4, 1.0, 0.0), (0.2, 3.0, 4.0), (0.1, 2.0, 1.0), (0.3, 9.0, 2.0)]
    later = [(0.4, 3.0, 0.0), (0.2, 3.0, 5.0), (0.1, 2.0, 1.0), (0.3, 9.0, 2.0)]
    found = figures.fields(steps_of(1, *by_rank) + steps_of(1, *later), 10.0)
    assert tuple(found) == FIELDS
    waits, alone, skipped = (0.1, 0.2, 0.4), (2.0, 2.0, 9.0), (0, 1, 5)  # the mean of rank 0 alone is 2
    assert list(found.values()) == pytest.approx([*waits, *alone, *skipped])


def test_a_rank_is_named_once_after_it_was_slow_for_long(caplog):
    figures = RankFigures(["a", "node07"])
    fast_one, slow = (0.0, 1.0, 0.0), (0.0, 2.2, 0.0)
    figures.fields(steps_of(SLOW_STEPS - 1, fast_one, slow), 2.0)
    figures.fields(steps_of(1, fast_one, fast_one), 2.0)  # and again from the start
    figures.fields(steps_of(SLOW_STEPS - 1, fast_one, slow), 2.0)
    assert not caplog.messages
    figures.fields(steps_of(3 * SLOW_STEPS, fast_one, slow), 2.0)
    (line,) = caplog.messages
    assert line.startswith("rank 1 on node07: alone_s")


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        ((0.001, 0.1, 0.0), (0.004, 0.1, 0.0)),  # 3 ms of a step of 100 ms
        ((0.0, 0.1, 0.0), (0.0, 0.1, 9.0)),
        ((0.1, 0.1, 30.0), (0.2, 0.2, 60.0)),  # twice the median, not above
    ],
)
def test_little_is_not_slow(usual, other, caplog):
    RankFigures(["a"] * 3).fields(steps_of(2 * SLOW_STEPS, usual, usual, other), 0.1)
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize(("size", "what"), [(2, "data_wait_s"), (4, "alone_s")])
def test_a_rank_that_sleeps_is_named(scenes, tmp_path, monkeypatch, without_tensorboard, size, what):
    """Rank 1 sleeps where it reads data, or where it computes."""
    monkeypatch.setattr(rank_figures, "SLOW_STEPS", 4)
    config = pretrain_config(scenes, tmp_path / "run", batch_size=2 * size, max_steps=6, log_every=3)

    def work() -> None:
        logging.basicConfig(stream=sys.stderr, force=True)
        if os.environ["RANK"] == "1":
            slow_down(*{"data_wait_s": (Prefetcher, "get"), "alone_s": (fast, "encode")}[what])
        pretrain(config)

    log = tmp_path / "log"
    assert all(ended_well(pid) for pid in in_ranks(work, size, log)), log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if what in line]
    assert "rank 1 on" in line
    for row in rows_of(config.out):
        assert set(FIELDS) <= set(row)
        assert row[f"{what}_max"] > PAUSE_S
        assert row["skipped_max"] == 0


def slow_down(place, name: str) -> None:
    function = getattr(place, name)

    def slow(*arguments, **settings):
        time.sleep(PAUSE_S)
        return function(*arguments, **settings)

    setattr(place, name, slow)
