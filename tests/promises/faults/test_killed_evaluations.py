"""Three killed evaluations, and two and four ranks. `make faults-evaluation` kills ten."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_evaluation.py")


@pytest.mark.slow
def test_killed_evaluations_and_four_ranks_find_the_figures_of_one_process():
    command = [sys.executable, str(SCRIPT), "--kills", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kills = int(done.stdout.split()[0])  # the last evaluation may be killed more often than asked for
    assert kills >= 3
    assert "one of two ranks killed: the other ends" in done.stdout
    assert "2 and 4 ranks: the same figures" in done.stdout
