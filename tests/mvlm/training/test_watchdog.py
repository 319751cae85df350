"""The watchdog, in forked processes that it may end."""

import os
import signal
import threading
import time

import pytest

from mvlm.training import watchdog as watchdog_module
from mvlm.training.watchdog import EXIT_CODE, Watchdog


def code_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hang_in_the_loader() -> None:
    time.sleep(30)


def test_watchdog_ends_a_stall_with_the_stacks_of_all_threads(tmp_path, capfd):
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        threading.Thread(target=time.sleep, args=(30,), name="another", daemon=True).start()
        with Watchdog(tmp_path / "stalled.txt", rank=2, minutes=0.5 / 60) as watchdog:
            watchdog.beat("the data of step 7")
            hang_in_the_loader()
        os._exit(0)
    assert code_of(process) == EXIT_CODE
    assert 0.4 < time.monotonic() - started < 20
    stacks = (tmp_path / "stalled.txt").read_text()
    error = capfd.readouterr().err
    for text in (stacks, error):
        assert "mvlm: rank 2 has been waiting" in text
        assert "for the data of step 7, more than stall_minutes 0.00833333; the run ends here" in text
        assert "continue from the last checkpoint with --resume" in text
        assert "in hang_in_the_loader" in text
        assert text.count("hread 0x") >= 3  # the main one, the other and the watchdog's


def test_watchdog_ends_a_rank_that_waits_for_one_that_failed(tmp_path, capfd):
    told = iter([None, None])
    process = os.fork()
    if process == 0:
        watchdog_module.GRACE_SECONDS = 0.2
        failure = "rank 1: ValueError: a broken thing"
        with Watchdog(
            tmp_path / "stalled.txt", rank=0, minutes=1 / 60, failure=lambda: next(told, failure)
        ) as watchdog:
            watchdog.beat("step 7")
            for _ in range(300):  # progress alone does not keep it
                time.sleep(0.1)
                watchdog.beat("step 7")
        os._exit(0)
    started = time.monotonic()
    assert code_of(process) == 1
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err.splitlines() == [
        "mvlm: rank 0 was waiting for step 7 and ends, because another rank failed: "
        "rank 1: ValueError: a broken thing; continue from the last checkpoint with --resume"
    ]
    assert not list(tmp_path.iterdir())


def test_watchdog_lets_a_rank_end_by_itself_after_another_one_failed(tmp_path):
    process = os.fork()
    if process == 0:
        with Watchdog(tmp_path / "stalled.txt", rank=0, minutes=1 / 60, failure=lambda: "rank 1: x"):
            time.sleep(0.5)
        os._exit(0)
    assert code_of(process) == 0


@pytest.mark.slow
def test_watchdog_leaves_a_run_that_makes_progress(tmp_path):
    process = os.fork()
    if process == 0:
        with Watchdog(tmp_path / "stalled.txt", rank=0, minutes=0.5 / 60) as watchdog:
            for step in range(10):
                watchdog.beat(f"step {step}")
                time.sleep(0.1)
        os._exit(0)
    assert code_of(process) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_watchdog_leaves_a_process_that_was_suspended(tmp_path):
    process = os.fork()
    if process == 0:
        with Watchdog(tmp_path / "stalled.txt", rank=0, minutes=1 / 60) as watchdog:
            watchdog.beat("step 1")
            os.kill(os.getpid(), signal.SIGSTOP)  # as Ctrl-Z does, until the parent sends SIGCONT
            time.sleep(0.5)
        os._exit(0)
    os.waitpid(process, os.WUNTRACED)
    time.sleep(2)
    os.kill(process, signal.SIGCONT)
    assert code_of(process) == 0
    assert not list(tmp_path.iterdir())


def test_watchdog_thread_ends_with_its_context(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path / "stalled.txt", rank=0, minutes=1):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
