"""Tables of LEADERBOARD.md, made from the files in `records/`: `python -m mvlm.speedrun.table` writes them."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mvlm.speedrun.tracks import TRACKS, figure

ROOT = Path(__file__).parents[2]
COLUMNS = {
    "tr.r1": "image to text R@1",
    "ir.r1": "text to image R@1",
    "gain_text_nats": "text gain",
    "gain_pixels_pct": "pixel gain",
}
HEAD = ("record", "time", *COLUMNS.values(), "steps", "PFLOP", "commit", "machine", "date")
NONE = {"two-cores": "None is listed yet.", "one-h100": "Empty: no GPU has run it."}
"""What stands in place of a table without records, by track."""


def table(track: str, records: dict[str, dict[str, Any]]) -> str:
    """Markdown table of a track's records, the fastest first. `records` are contents of files by name."""
    found = sorted((r["seconds"], name) for name, r in records.items() if r["track"] == track)
    if not found:
        return NONE[track]
    rows = [HEAD, ("---",) * len(HEAD), *(_row(name, records[name]) for _, name in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, record: dict[str, Any]) -> tuple[str, ...]:
    last = record["parts"][-1]
    machine = last["machine"]["processor"] if last["machine"]["device"] == "cpu" else last["machine"]["device"]
    figures = (f"{figure(record['figures'], column):.2f}" for column in COLUMNS)
    minutes, seconds = divmod(round(record["seconds"]), 60)
    return (
        f"[{name}](records/{name}.json)",
        f"{minutes} min {seconds} s",
        *figures,
        str(record["steps"]),
        f"{record['flops'] / 1e15:.2f}",
        last["commit"],
        machine,
        last["time"][:10],
    )


def with_tables(page: str, folder: Path) -> str:
    """The page with the table of each track between its marks, from the records in a folder."""
    records = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for track in TRACKS:
        marks = re.compile(rf"(<!-- records: {track} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marks.subn(lambda m, track=track: f"{m[1]}{table(track, records)}\n{m[2]}", page)
        assert count == 1, f"wanted one place for the records of {track}, found {count}"
    return page


if __name__ == "__main__":
    about = "Write the tables of a checkout's LEADERBOARD.md, from the files in its records/."
    argparse.ArgumentParser(description=about).parse_args()
    board = ROOT / "LEADERBOARD.md"
    if not board.is_file():
        raise SystemExit(f"wanted a checkout with {board.name}, found none in {ROOT}")
    board.write_text(with_tables(board.read_text(), ROOT / "records"))
