"""A slice of the emulated kernels in every suite. `make emulate` runs all of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.extended
@pytest.mark.slow
def test_emulator_and_the_fast_cases_of_every_kernel_pass() -> None:
    """The emulator needs a process that compiles kernels, and this one interprets them."""
    command = [sys.executable, "-m", "pytest", "tests/emulator", "tests/triton_proof"]
    command += ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100
