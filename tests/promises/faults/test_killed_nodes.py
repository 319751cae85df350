"""One killed node of a Ray cluster of two. `make faults-parts` kills twenty of three."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_nodes.py")


@pytest.mark.slow
def test_a_build_on_ray_survives_the_loss_of_a_node():
    pytest.importorskip("ray")
    command = [sys.executable, str(SCRIPT), "--kills", "1", "--nodes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "1 nodes of 2 killed during builds: the bytes of one machine's build" in done.stdout
