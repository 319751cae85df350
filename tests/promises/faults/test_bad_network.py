"""Eight epochs of remote data behind failing servers. `make faults-network` has fifty."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("bad_network.py")


@pytest.mark.slow
def test_remote_data_is_right_or_ends_in_an_error_with_the_url():
    command = [sys.executable, str(SCRIPT), "--trials", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert '"loaded": 6, "ended in DataError": 2' in done.stdout
