"""Four killed embedding processes, and two ranks. `make faults-embedding` kills twenty."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_embedding.py")


@pytest.mark.slow
def test_killed_embeddings_and_two_ranks_write_the_files_of_one_process():
    command = [sys.executable, str(SCRIPT), "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 kills over" in done.stdout
    assert "2 ranks: the same files" in done.stdout
