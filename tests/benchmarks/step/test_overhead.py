"""Overhead of logging, safety checks and checkpoints: timing of known functions, and a short real run."""

import time
from dataclasses import replace

import pytest

from mvlm.config.model import MaskVLMConfig
from mvlm.config.recipes import pretrain_defaults
from mvlm_benchmarks.step import overhead
from mvlm_benchmarks.step.overhead import CallTimer, measure
from support.shapes import copy_shapes


def test_time_of_a_nested_function_counts_only_for_it(monkeypatch):
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)  # a loaded machine wakes late from a real sleep
    timer = CallTimer()
    inner = timer.timed("safety", lambda: wait(0.05))

    def outer() -> None:
        wait(0.02)
        inner()
        inner()

    timer.timed("logging", outer)()
    assert timer.calls["safety"] == pytest.approx([0.05, 0.05])
    assert timer.calls["logging"] == pytest.approx([0.02])


@pytest.mark.slow
def test_overhead_of_a_run_is_measured(monkeypatch, tmp_path):
    """Every timed function runs once per step, and the shares follow from the times."""

    def small(preset, data, out):
        sizes = {"image_layers": 1, "text_layers": 1, "cross_layers": 1, "decoder_layers": 1, "width": 24, "heads": 2}
        model = MaskVLMConfig.preset(preset, **sizes)
        return replace(pretrain_defaults(preset, data, out), batch_size=4, model=model, precision="fp32")

    monkeypatch.setattr(overhead, "pretrain_defaults", small)
    monkeypatch.setattr(overhead, "SAVE_EVERY", 3)
    timers = []
    monkeypatch.setattr(overhead, "CallTimer", lambda: timers.append(CallTimer()) or timers[-1])
    found = measure(copy_shapes(tmp_path / "data"), "tiny", 6)
    calls = timers[0].calls
    assert len(calls["step"]) == 6
    assert len(calls["logging"]) == pytest.approx(3 * 6, abs=4)  # close, write, the norms; and before a save
    assert all(value > 0 for value in found.values())
    assert found["together_share"] == pytest.approx(
        (found["logging_ms"] + found["safety_ms"]) / found["step_ms"] + found["save_stall_ms"] / 6e5
    )
    assert found["stall_over_whole"] == pytest.approx(found["save_stall_ms"] / found["save_whole_ms"])
