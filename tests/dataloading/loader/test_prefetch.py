import itertools
import threading
import time

import pytest

from mvlm_dataloading.loader.prefetch import Prefetcher


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mvlm-loader"]


def test_prefetcher_yields_in_order_and_stays_within_its_depth():
    made, ended = [], []
    numbers = itertools.count()

    def make():
        made.append(next(numbers))
        return f"result {made[-1]}"

    ahead = Prefetcher(make, 3, lambda: ended.append(True))
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    assert [ahead.get() for _ in range(20)] == [f"result {k}" for k in range(20)]
    assert not ended
    ahead.close()
    assert len(made) <= 23
    assert ended == [True]
    assert threads() == []


def test_prefetcher_ends_and_raises_in_turn_and_repeatedly():
    def failing(results):
        yield from results
        raise OSError("the disk is gone")

    results = failing(["a", "b"])
    ahead = Prefetcher(lambda: next(results), 5, lambda: None)
    assert [ahead.get(), ahead.get()] == ["a", "b"]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.get()
    ahead.close()

    left = iter(["a", None])
    ahead = Prefetcher(lambda: next(left), 5, lambda: None)
    assert [ahead.get() for _ in range(4)] == ["a", None, None, None]
    assert threads() == []


def test_prefetcher_close_waits_and_can_be_repeated():
    inside, go = threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert go.wait(5)
        return 1

    ahead = Prefetcher(slow, 1, lambda: None)
    assert inside.wait(5)
    threading.Timer(0.05, go.set).start()
    ahead.close()
    ahead.close()
    assert threads() == []


def test_an_error_at_the_end_of_the_thread_reaches_the_caller():
    """Else the caller would wait for ever."""

    def fail() -> None:
        raise OSError("could not clean up")

    ahead = Prefetcher(lambda: None, 1, fail)
    with pytest.raises(OSError, match="could not clean up"):
        ahead.get()
    ahead.close()
