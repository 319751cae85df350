"""One trial of each kind of fault. `make faults` does a thousand, `.ci/run` 45."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_every_kind_of_fault_ends_well(tmp_path):
    command = [sys.executable, str(SCRIPT), "--count", "9", "--seed", "1", "--json", str(tmp_path / "faults.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "faults.json").read_text())
    assert figures["trials"] == len({row["fault"] for row in figures["rows"]}) == 9
    assert figures["failed"] == []
