"""One trial of each kind of fault. `make faults` runs a thousand, and `.ci/run` as many as it has time for."""

import json
import subprocess
import sys
from pathlib import Path


def test_every_kind_of_fault_ends_well(tmp_path):
    campaign = Path(__file__).parent / "campaign.py"
    words = [sys.executable, str(campaign), "--count", "9", "--seed", "1", "--json", str(tmp_path / "faults.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "faults.json").read_text())
    assert figures["trials"] == len({row["fault"] for row in figures["rows"]}) == 9
    assert figures["failed"] == []
