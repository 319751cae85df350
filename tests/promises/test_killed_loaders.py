"""Ten kills, and several ranks, as processes; `make faults` kills fifty."""

import subprocess
import sys
from pathlib import Path

from support.data import write_waves

SCRIPT = Path(__file__).with_name("kill_loaders.py")


def test_batches_of_killed_processes_and_of_several_ranks_are_those_of_one(tmp_path):
    command = [sys.executable, str(SCRIPT), str(write_waves(tmp_path / "data")), "--kills", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "10 kills within" in done.stdout
    assert "1 -> 4 -> 2 ranks over" in done.stdout
