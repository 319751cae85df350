"""Programs beside a stage: exit codes, output, and nothing of them is left when their time is over."""

import sys
import time
from pathlib import Path

import pytest

from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.gpu import correct, profile, sanitizer
from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Stage


def test_exit_code_and_output_of_a_program(tmp_path) -> None:
    path = tmp_path / "output"
    program = "import os, sys; print(os.environ['WORD'], flush=True); sys.exit('bad')"
    with path.open("w") as output:
        assert run_program([sys.executable, "-c", program], 60, output, {"WORD": "hello"}) == 1
    assert path.read_text() == "hello\nbad\n"
    with path.open("w") as output:
        assert run_program([str(tmp_path / "absent")], 60, output) == 127
    assert "No such file" in path.read_text()


def launcher(folder: Path, name: str) -> str:
    """A program that starts another one, as ncu does, and waits for it. Its number is in the file `child`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nsleep 50 & echo $! > {folder}/child; wait\n")
    path.chmod(0o755)
    return str(path)


def wait_for_the_end_of_the_child(folder: Path) -> None:
    child = Path("/proc") / (folder / "child").read_text().strip()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():  # ended, and nobody has asked how
        assert time.monotonic() < deadline, "what the program started still runs"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["ncu", "compute-sanitizer", "pytest"])
def test_what_a_tool_started_ends_when_its_time_is_over(tmp_path, monkeypatch, name: str) -> None:
    program = launcher(tmp_path, name)
    stage = Stage("toy", tmp_path, Budget(2.0), rehearse=False)
    if name == "ncu":
        status = next(iter(profile.profile_kernel(stage, program, "short_kv_backward", "cross_attention")))["status"]
    elif name == "compute-sanitizer":
        status = sanitizer.check(stage, program, "memcheck", 1.0)["status"]
    else:
        monkeypatch.setattr(sys, "executable", program)
        status = correct.run_tests(stage)["status"]
    assert status == "out of time"
    wait_for_the_end_of_the_child(tmp_path)
