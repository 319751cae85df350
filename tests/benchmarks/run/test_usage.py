"""Counters of the process: known work in known threads."""

import threading
import time

import pytest

from mvlm_benchmarks.run.usage import LOADER, MAIN, OTHER, TEAM, group_of_thread, read_usage, usage_between


def work(seconds: float) -> None:
    """Use so much processor time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_processor_time_belongs_to_the_thread_that_used_it():
    loader_done, end = threading.Event(), threading.Event()

    def load() -> None:
        work(0.06)
        loader_done.set()
        end.wait()

    before = read_usage()
    loader = threading.Thread(target=load, name="mvlm-loader")
    ended = threading.Thread(target=work, args=(0.04,), name="save-1")
    loader.start()
    ended.start()
    work(0.1)
    ended.join()
    loader_done.wait()
    found = usage_between(before, read_usage(), steps=2)
    end.set()
    loader.join()
    assert found["cpu_main_s"] == pytest.approx(0.05, rel=0.3)
    assert found["cpu_loader_s"] == pytest.approx(0.03, rel=0.3)
    assert found["cpu_other_s"] == pytest.approx(0.02, rel=0.6)  # the thread has ended; the clock of the process knows
    assert found["cpu_s"] == pytest.approx(sum(found[f"cpu_{group}_s"] for group in (MAIN, TEAM, LOADER, OTHER)))
    assert found["seconds"] >= found["cpu_s"] / 4
    for name in ("mvlm-resize_1", "[DALI][TP0]Exec"):
        assert group_of_thread(name, python=False, main=False) == LOADER
    assert group_of_thread("python", python=False, main=False) == TEAM
