"""Requests to end a run: signals and the preemption file. The watchdog, in forked processes that it may end."""

import os
import signal
import threading
import time

import pytest

from mvlm.training import stopping
from mvlm.training.stopping import EXIT_CODE, StopRequest, Watchdog


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_requests_a_stop_and_handlers_are_restored(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.reason == signal.Signals(number).name
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert {n: signal.getsignal(n) for n in before} == before


def test_preemption_file_requests_a_stop(tmp_path, monkeypatch):
    """The file is polled once a second."""
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with StopRequest(tmp_path / "notice") as stop:
        assert not stop.requested()
        (tmp_path / "notice").touch()
        clock[0] = 0.9
        assert not stop.requested()
        clock[0] = 1.0
        assert stop.requested()
        assert stop.reason == str(tmp_path / "notice")


def test_in_another_thread_only_the_file_requests_a_stop(tmp_path):
    """Python allows signal handlers in the main thread only."""
    (tmp_path / "notice").touch()
    found = []

    def look():
        with StopRequest(tmp_path / "notice") as stop:
            found.append(stop.requested())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_second_signal_ends_the_process_at_once(number, code):
    """In a forked process, which would wait for a minute."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with StopRequest() as stop:
                os.write(writing, b"1")
                while not stop.requested():
                    time.sleep(0.01)
                os.write(writing, b"2")
                time.sleep(60)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    for wait in (0, stopping.SAME_REQUEST_SECONDS if number == signal.SIGTERM else 0):
        assert os.read(reading, 1)
        time.sleep(wait)
        os.kill(process, number)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code
    assert time.monotonic() - started < 20


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
        assert "the data of step 7" in text
        assert "in hang_in_the_loader" in text
        assert text.count("hread 0x") >= 3  # the main one, the other and the watchdog's


def test_watchdog_ends_a_rank_that_waits_for_one_that_failed(tmp_path, capfd):
    told, failure = iter([None, None]), "rank 1: ValueError: a broken thing"
    process = os.fork()
    if process == 0:
        stopping.GRACE_SECONDS = 0.2
        file = tmp_path / "stalled.txt"
        with Watchdog(file, rank=0, minutes=1 / 60, failure=lambda: next(told, failure)) as watchdog:
            watchdog.beat("step 7")
            for _ in range(300):  # progress alone does not keep it
                time.sleep(0.1)
                watchdog.beat("step 7")
        os._exit(0)
    started = time.monotonic()
    assert code_of(process) == 1
    assert time.monotonic() - started < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert failure in line
    assert not list(tmp_path.iterdir())


def test_watchdog_lets_a_rank_end_by_itself_after_another_one_failed(tmp_path):
    process = os.fork()
    if process == 0:
        with Watchdog(tmp_path / "stalled.txt", rank=0, minutes=1 / 60, failure=lambda: "rank 1: x"):
            time.sleep(0.5)
        os._exit(0)
    assert code_of(process) == 0
