"""Waits of OpenMP's threads beside other busy processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mvlm.waiting import busy_others, let_threads_sleep


def test_other_threads_that_run_are_counted_and_not_this_one():
    texts = iter(["0 0 0 1/9 1", "0 0 0 4/9 1", "0 0 0 4/9 1", "0 0 0 3/9 1", "0 0 0 9/9 1"])
    assert busy_others(lambda: next(texts)) == 3  # the median of 0, 3, 3, 2 and 8
    for text in ("", "0 0 0 x/9 1", "1 2"):
        assert busy_others(lambda text=text: text) == 0


@pytest.mark.parametrize(
    "others, cores, environment, sleeps",
    [
        (0, 2, {}, False),
        (1, 2, {}, True),
        (3, 8, {}, True),
        (3, 8, {"OMP_NUM_THREADS": "4"}, False),  # cores for all
        (1, 2, {"OMP_NUM_THREADS": "1"}, False),  # it waits for nobody
        (1, 2, {"OMP_WAIT_POLICY": "active"}, False),
        (1, 2, {"GOMP_SPINCOUNT": "7"}, False),
    ],
)
def test_threads_sleep_if_others_want_the_cores_and_the_user_decides(others, cores, environment, sleeps):
    given = dict(environment)
    notice = let_threads_sleep(environment, others, cores)
    assert (notice is not None) == sleeps
    assert (environment != given) == sleeps
    assert environment.get("GOMP_SPINCOUNT", "") == (given.get("GOMP_SPINCOUNT") or ("1000" if sleeps else ""))


@pytest.fixture
def busy() -> Iterator[None]:
    """As many processes that only work as there are cores."""
    work = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(work) for _ in os.sched_getaffinity(0)]
    time.sleep(0.5)
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_busy_processes_beside_a_command_are_seen(busy):
    done = subprocess.run(
        [sys.executable, "-c", "from mvlm import waiting; waiting.prepare(); print(waiting.NOTICE)"],
        env={name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ("sleep" in done.stdout) == (len(os.sched_getaffinity(0)) > 1)
