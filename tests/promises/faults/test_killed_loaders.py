"""Ten killed loading processes, and several ranks. `make faults-loading` kills fifty."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.data import write_waves

SCRIPT = Path(__file__).with_name("kill_loaders.py")


@pytest.mark.slow
def test_killed_loaders_and_several_ranks_yield_the_batches_of_one_process(tmp_path):
    command = [sys.executable, str(SCRIPT), str(write_waves(tmp_path / "data")), "--kills", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "10 kills within" in done.stdout
    assert "1 -> 4 -> 2 ranks over" in done.stdout
