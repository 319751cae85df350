"""Requests to end a run: signals in this process and in a forked one, and the preemption file."""

import errno
import os
import signal
import threading
import time

import pytest

from mvlm.training import stop_request
from mvlm.training.stop_request import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_requests_a_stop_and_handlers_are_restored(number, capfd):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopRequest() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert stop.reason == signal.Signals(number).name
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert {n: signal.getsignal(n) for n in before} == before
    wanted = "finishing the step and saving; Ctrl-C once more, or SIGTERM after 3 seconds, ends at once"
    assert wanted in capfd.readouterr().err


def test_signal_requests_a_stop_even_if_stderr_is_closed(monkeypatch):
    """Ctrl-C also ends a `| tee`."""

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(stop_request.os, "write", broken)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()


def test_preemption_file_requests_a_stop(tmp_path, monkeypatch):
    """The file is polled once a second."""
    clock = [0.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: clock[0])
    with StopRequest(tmp_path / "notice") as stop:
        assert not stop.requested()
        (tmp_path / "notice").touch()
        clock[0] = 0.9
        assert not stop.requested()
        clock[0] = 1.0
        assert stop.requested()
        assert stop.reason == str(tmp_path / "notice")


def test_a_disk_that_fails_for_a_moment_is_no_request(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with StopRequest(tmp_path / "notice") as stop:
        monkeypatch.setattr(os, "stat", fail)
        assert not stop.requested()


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
    for wait in (0, stop_request.SAME_REQUEST_SECONDS if number == signal.SIGTERM else 0):
        assert os.read(reading, 1)
        time.sleep(wait)
        os.kill(process, number)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code
    assert time.monotonic() - started < 20


def test_a_sigterm_that_is_passed_on_is_the_same_request(monkeypatch):
    """A supervisor signals every process of a job, and torchrun passes its own signal on to its workers."""
    clock = [0.0]
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: clock[0])
    with StopRequest() as stop:
        for clock[0] in (0.0, 0.001, 2.9):
            os.kill(os.getpid(), signal.SIGTERM)  # would end this process
            assert stop.requested()
        clock[0] = 3.0
        assert stop.requested()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
