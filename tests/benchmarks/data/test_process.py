"""A loader in its own process: its processor time, and its failure."""

import subprocess
import sys
from pathlib import Path

import pytest

from mvlm_benchmarks.data.process import LoaderProcess, group_cpu_seconds


@pytest.mark.slow
def test_group_cpu_seconds_include_the_workers() -> None:
    spin = """if 1:
    import os, sys, time
    os.fork()
    while time.process_time() < 0.15:
        pass
    print(time.process_time(), flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", spin]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        printed = sum(float(process.stdout.readline()) for _ in range(2))
        assert printed <= group_cpu_seconds(process.pid) < printed + 0.05
        process.communicate()


def test_process_that_dies_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    contender = LoaderProcess("ours", "crop", Path("none"), 32, 224)
    contender.close()
    assert (contender.status, contender.note) == ("error", "ended with code 1")
