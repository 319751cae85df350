"""Rounds of training steps, and the figures that they make."""

from typing import Any

import pytest

from mvlm_benchmarks.step import report
from mvlm_kernels.hardware import GPUS


def test_ratios_are_medians_of_rounds_against_the_fastest_baseline() -> None:
    """The machine is ten times slower in the second round, which a ratio of medians would not cancel."""
    rows: list[dict[str, Any]] = [
        {"contender": "timm+roberta", "seconds": [2.0, 20.0, 2.0]},
        {"contender": "timm+decoder-layer", "seconds": [3.0, 30.0, 3.0]},
        {"contender": "timm+roberta-compiled", "seconds": [1.5, 15.0, 1.5]},
        {"contender": "plain", "seconds": [1.0, 10.0, 1.0]},
    ]
    for number, row in enumerate(rows):
        row |= {"note": "", "cpu_seconds": row["seconds"], "peak_mb": 10.0 * (number + 1)}
    gflop = {"timm+roberta": 6.0, "plain": 3.0}
    report.add_figures(rows, gflop, 8, GPUS["H100"])
    assert [row["vs_eager"] for row in rows] == pytest.approx([1, 2 / 3, 4 / 3, 2])
    assert [row["vs_compiled"] for row in rows] == pytest.approx([0.75, 0.5, 1, 1.5])
    assert [row["peak_vs_eager"] for row in rows] == pytest.approx([1, 2, 3, 4])
    assert [row["pairs_per_s"] for row in rows] == pytest.approx([4, 8 / 3, 16 / 3, 8])
    # 3 GFLOP of its own, 6 of the baseline's, at 8 pairs a second.
    assert rows[3]["mfu_pct"] == pytest.approx(100 * 24e9 / 989e12)
    assert rows[3]["mfu_baseline_pct"] == pytest.approx(100 * 48e9 / 989e12)
    assert "timm+roberta 6.0 (1.00), plain 3.0 (0.50)" in report.flops_table(gflop)
    alone = [{"contender": "plain", "note": "", "seconds": [1.0], "cpu_seconds": [1.0], "peak_mb": 5.0}]
    report.add_figures(alone, gflop, 8, None)
    assert alone[0]["vs_eager"] is alone[0]["vs_compiled"] is alone[0]["peak_vs_eager"] is None
    assert "-" in report.table(alone)
