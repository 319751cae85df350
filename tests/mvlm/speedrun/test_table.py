"""Tables of LEADERBOARD.md: those of the committed records, and made-up ones."""

import json
from pathlib import Path
from typing import Any

from mvlm.speedrun.table import table, with_tables
from mvlm.speedrun.tracks import TRACKS, check_targets

ROOT = Path(__file__).parents[3]


def test_the_leaderboard_has_the_committed_records():
    """`python -m mvlm.speedrun.table` writes it. Each record reaches the targets of its track."""
    page = (ROOT / "LEADERBOARD.md").read_text()
    assert with_tables(page, ROOT / "records") == page
    for file in (ROOT / "records").glob("*.json"):
        record = json.loads(file.read_text())
        assert check_targets(TRACKS[record["track"]], record["figures"]).passed
        assert f"### {file.stem}" in page, f"{file.stem} has no entry in the lab log"


def test_the_fastest_record_is_first():
    def record(seconds: float, track: str = "two-cores") -> dict[str, Any]:
        machine = {"device": "cpu", "processor": "Some CPU"}
        return {
            "track": track,
            "seconds": seconds,
            "steps": 640,
            "flops": 2.5e15,
            "figures": {"tr": {"r1": 42.13}, "ir": {"r1": 32.0}, "gain_text_nats": 0.89, "gain_pixels_pct": 16.4},
            "parts": [{"commit": "abc", "time": "2026-11-26T10:00:00+00:00", "machine": machine}],
        }

    records = {"slow": record(700.2), "fast": record(419.6), "gpu": record(3, "one-h100")}
    lines = table("two-cores", records).splitlines()
    assert len(lines) == 4
    cells = "7 min 0 s | 42.13 | 32.00 | 0.89 | 16.40 | 640 | 2.50 | abc | Some CPU | 2026-11-26"
    assert lines[2] == f"| [fast](records/fast.json) | {cells} |"
    assert lines[3].startswith("| [slow](records/slow.json) | 11 min 40 s |")
    assert "no GPU has run it" in table("one-h100", {})
