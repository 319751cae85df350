"""Processes that share the trials of a study."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm.errors import RunError
from mvlm.studies.run import run_jobs


@pytest.fixture
def python(tmp_path, monkeypatch) -> Path:
    """A program in place of Python, which prints its arguments and its threads."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@" on $OMP_NUM_THREADS\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return program


@pytest.mark.parametrize("part, jobs", [((1, 1), 2), ((2, 3), 4), ((1, 2), 3)])
def test_processes_share_the_trials_of_their_part(python, capfd, part, jobs) -> None:
    run_jobs(["a b.toml", "--data", "d"], part, jobs)
    lines = sorted(capfd.readouterr().out.splitlines())
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    shares = []
    for job, line in enumerate(lines, 1):
        start, end = f"[{job}] -m mvlm study a b.toml --data d --part ", f" on {threads}"
        assert line.startswith(start)
        assert line.endswith(end)
        number, parts = map(int, line.removeprefix(start).removesuffix(end).split("/"))
        shares.append(range(100)[number - 1 :: parts])
    assert len(shares) == jobs
    number, parts = part
    assert sorted(trial for share in shares for trial in share) == list(range(100)[number - 1 :: parts])


@pytest.mark.parametrize("visible, gpus", [("", "010"), ("5,7", "575")])
def test_processes_take_the_gpus_in_turn(python, capfd, monkeypatch, visible, gpus) -> None:
    python.write_text("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_jobs(["study.toml"], (1, 1), 3)
    assert sorted(capfd.readouterr().out.splitlines()) == [f"[{job}] {gpu}" for job, gpu in enumerate(gpus, 1)]


def test_a_process_that_fails_is_named(python) -> None:
    python.write_text('#!/bin/sh\ncase "$*" in *2/3) exit 2;; esac\n')
    with pytest.raises(RunError, match="wanted all 3 to end well, found an error in number 2; its reason is above"):
        run_jobs(["study.toml"], (1, 1), 3)


@pytest.mark.slow
def test_ctrl_c_reaches_each_process_once(tmp_path) -> None:
    """A terminal sends SIGINT to the whole group of processes. A trial that got a second signal would not save."""
    program = tmp_path / "python"
    program.write_text(
        f"""#!{sys.executable}
import signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.05)
time.sleep(1)  # it saves
print("got", len(got), flush=True)
"""
    )
    program.chmod(0o755)
    code = f"""
import signal, sys
from mvlm.studies.run import run_jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.executable = {str(program)!r}
run_jobs(["study.toml"], (1, 1), 2)
print("all ended well")
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] ready\n", "[2] ready\n"]
        os.killpg(process.pid, signal.SIGINT)
        lines = sorted(process.stdout.read().splitlines())
    assert lines == ["[1] got 1", "[2] got 1", "all ended well"]
    assert process.returncode == 0


def test_a_signal_that_is_ignored_stays_ignored(python, capfd) -> None:
    """Under nohup, the end of the terminal does not end the trials."""
    python.write_text("#!/bin/sh\nkill -HUP $PPID; sleep 0.5; echo done\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_jobs(["study.toml"], (1, 1), 1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr().out == "[1] done\n"
