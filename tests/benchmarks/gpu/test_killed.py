"""Writers of rows that are killed at a random moment: every row that was measured is in its file, whole."""

import csv
import os
import random
import signal
import time
from pathlib import Path

from mvlm_benchmarks.results import MACHINE_COLUMNS, RowFile


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file. What follows the last line end is the beginning of one that a kill cut off."""
    whole, _, _ = path.read_text().rpartition("\n")
    rows = list(csv.DictReader(whole.splitlines()))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def test_rows_of_a_killed_writer_are_whole(tmp_path) -> None:
    about = dict.fromkeys(MACHINE_COLUMNS, "x") | {"versions": {}}
    chance = random.Random(0)
    for trial in range(10):
        path, (reader, writer) = tmp_path / f"{trial}.csv", os.pipe()
        process = os.fork()
        if not process:
            try:
                file = RowFile(path, about, ("number", "text"))
                for number in range(0, 10**9, 3):
                    file.append([{"number": number + n, "text": "words, " * 200} for n in range(3)])
                    os.write(writer, f"{number + 3}\n".encode())
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as reports:
            reported = int(reports.readline())
            time.sleep(chance.uniform(0, 0.05))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            reported = max([reported, *map(int, reports.read().split())])
        rows = read(path)
        assert [row["number"] for row in rows] == [str(n) for n in range(len(rows))]
        assert len(rows) >= reported
