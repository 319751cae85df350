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


def test_times_of_a_device_behind_the_host_are_known_a_step_later(monkeypatch):
    """The host stops the time of each step before the device has come to the end of the one before."""
    done, recorded = [0], []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(self)

        def query(self) -> bool:
            return recorded.index(self) < done[0]

        def elapsed_time(self, ended: "Event") -> float:
            return 1000.0 * (recorded.index(ended) + 1)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch, found = Stopwatch(torch.device("cuda")), []
    for step in range(4):
        watch.start()
        watch.stop()
        done[0] = 2 * step  # all events of the steps before
        found.append(watch.seconds())
    assert found == [0.0, 2.0, 4.0, 6.0]
