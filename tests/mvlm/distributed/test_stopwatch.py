"""The time that a rank computes before it waits for others."""

import time

import torch

from mvlm.distributed.stopwatch import Stopwatch


def test_a_stopwatch_keeps_the_first_stop_after_a_start(monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    watch.stop()
    watch.stop()
    assert watch.seconds() == 2.0
    watch.start()
    watch.stop()
    assert watch.seconds() == 1.0
