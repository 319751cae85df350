"""Stages that are killed at a random moment: every row that was measured is in its file, whole."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mvlm_benchmarks.gpu.stages import STAGES
from mvlm_benchmarks.results import MACHINE_COLUMNS, RowFile

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_run.py"


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file. What follows the last line end is the beginning of one that a kill cut off."""
    whole, _, _ = path.read_text().rpartition("\n")
    rows = list(csv.DictReader(whole.splitlines()))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def test_rows_of_a_killed_writer_are_whole(tmp_path) -> None:
    about = dict.fromkeys(MACHINE_COLUMNS, "x") | {"versions": {}}
    chance = random.Random(0)
    for trial in range(10):
        path, (reader, writer) = tmp_path / f"{trial}.csv", os.pipe()
        process = os.fork()
        if not process:
            try:
                file = RowFile(path, about, ("number", "text"))
                for number in range(0, 10**9, 3):
                    file.append([{"number": number + n, "text": "words, " * 200} for n in range(3)])
                    os.write(writer, f"{number + 3}\n".encode())
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as reports:
            reported = int(reports.readline())
            time.sleep(chance.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            reported = max([reported, *map(int, reports.read().split())])
        rows = read(path)
        assert [row["number"] for row in rows] == [str(n) for n in range(len(rows))]
        assert len(rows) >= reported


def ended(summary: Path) -> str:
    """How a stage says that it ended, in its summary; empty before there is one."""
    return json.loads(summary.read_text())["ended"] if summary.exists() else ""


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_killed_stage_keeps_its_rows(name: str, tmp_path) -> None:
    """A rehearsal is killed, launcher and all, at a random moment after its first row."""
    chance = random.Random(name)
    command = [sys.executable, str(SCRIPT), name, "--rehearse", "--out", str(tmp_path)]
    # The sweep compiles variants for half of its time at most, before its first row.
    command += ["--seconds", "40" if name == "sweep" else "300", "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    )  # fmt: skip
    path, about, seen, began = tmp_path / f"{name}.csv", tmp_path / f"{name}.json", 0, ""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        began = began or ended(about)
        seen = len(path.read_text().splitlines()) - 1 if path.exists() else 0
        if seen >= 1:
            break
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 2))
    seen = max(seen, len(path.read_text().splitlines()) - 1)
    was_running = process.poll() is None and ended(about) == began  # it may be on its way out
    with contextlib.suppress(ProcessLookupError):  # on a slow machine it may have ended by itself just now
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    rows = read(path)
    assert len(rows) >= seen >= 1
    assert rows[0]["figures"].startswith("rehearsal")
    assert began == "running, or killed"
    if was_running:
        assert ended(about) == began
