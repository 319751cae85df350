"""A soak test: one run for hours on small data, watched from outside. Memory and speed stay flat, nothing leaks.

    python tests/promises/faults/soak.py --minutes 120 --json benchmarks/results/soak.json

Memory is flat if its median over the last fifth of the time is within 5 % of that over the second fifth; speed, within
10 %. Open files, threads and processes must not grow, except by those of one save. Speed is pairs per second of
processor time, divided by that of a second, fresh run at the same time: other programs slow both alike through shared
caches. Plain speeds are reported but not judged.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm.runs.folder import read_metrics
from mvlm_dataloading.files import write_json
from support.faults.campaign import run_config, start
from support.faults.forks import wait
from support.shapes import copy_shapes

FRESH_RUNS = 30
"""Number of fresh runs to compare with, spread over the time; one a minute in a shorter test."""
WARM_UP_PAIRS = 2000
"""Pairs that a fresh run sees before it is timed: about ten seconds."""
MIN_SECONDS = 5.0
"""Shortest time over which two runs are compared: metrics are written every ten steps."""
SLACK = 4
"""Additional files or threads that a save in progress accounts for."""


def sample(process: int, metrics: Path) -> dict[str, float]:
    """A process now: memory in MB, open files, threads, children, seconds of processor time, and pairs seen."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]  # in user and in system mode
    children = [c for t in (folder / "task").iterdir() for c in (t / "children").read_text().split()]
    return {
        "time": time.monotonic(),
        "cpu_s": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        "pairs": last_pairs(metrics),
        "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(list((folder / "fd").iterdir())),
        "threads": len(list((folder / "task").iterdir())),
        "children": len(children),
    }


def speed_over_fresh(process: int, metrics: Path, fresh: Callable[[Path], int], seconds: float) -> float:
    """Speed of a process divided by that of a fresh, warm run at the same time, both in pairs per second of processor
    time. Timed for `seconds`. `fresh` starts a run in a folder, and returns its process."""
    again = metrics.parent.with_name("fresh")
    of_fresh = again / "metrics.jsonl"
    other = fresh(again)
    try:
        while last_pairs(of_fresh) < WARM_UP_PAIRS:
            time.sleep(0.1)
            if os.waitpid(other, os.WNOHANG)[0]:
                raise RuntimeError(again.with_suffix(".log").read_text()[-2000:])
        began = sample(process, metrics), sample(other, of_fresh)
        time.sleep(seconds)
        ended = sample(process, metrics), sample(other, of_fresh)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        shutil.rmtree(again)
    own, its = (rates([a, b], "cpu_s")[0] for a, b in zip(began, ended, strict=True))
    return own / its


def last_pairs(metrics: Path) -> float:
    """Pairs seen by the last complete row of metrics.jsonl; 0 if there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["pairs_seen"] if lines else 0


def rates(samples: list[dict[str, float]], by: str) -> list[float]:
    """Pairs per unit of `by` between samples, at most about a hundred values."""
    apart = max(1, len(samples) // 100)
    pairs = [(a, b) for a, b in zip(samples[::apart], samples[apart::apart], strict=False) if b[by] > a[by]]
    return [(b["pairs"] - a["pairs"]) / (b[by] - a[by]) for a, b in pairs]


def fifth(values: list[float], number: int) -> float:
    """Median of one fifth of the values, numbered from 0."""
    part = values[len(values) * number // 5 : len(values) * (number + 1) // 5]
    return median(part)


def verdicts(samples: list[dict[str, float]], relative: list[float]) -> dict[str, dict[str, float | bool]]:
    """Each quantity before and after, with "well" true if it stayed flat and absent if it is not judged.

    `relative` are values of `speed_over_fresh`.
    """
    found: dict[str, dict[str, float | bool]] = {}
    for name, values, share in (
        ("memory_mb", [row["memory_mb"] for row in samples], 0.05),
        ("speed_over_fresh", relative, 0.10),
    ):
        before, after = fifth(values, 1), fifth(values, 4)
        found[name] = {"before": round(before, 2), "after": round(after, 2), "well": abs(after / before - 1) <= share}
    for name in ("files", "threads", "children"):
        values = [row[name] for row in samples]
        before, after = fifth(values, 1), fifth(values, 4)
        found[name] = {"before": before, "after": after, "well": after <= before + SLACK}
    for name, by in (("pairs_per_cpu_s", "cpu_s"), ("pairs_per_s", "time")):
        speeds = rates(samples, by)
        found[name] = {"before": round(fifth(speeds, 1), 2), "after": round(fifth(speeds, 4), 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0, help="how long to train, at least 5")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if arguments.minutes < 5:  # a verdict compares fifths of the time
        parser.error(f"wanted at least 5 minutes, got {arguments.minutes:g}")
    with tempfile.TemporaryDirectory(prefix="mvlm-soak-") as folder:
        data, out = copy_shapes(Path(folder) / "data"), Path(folder) / "run"
        often = {"max_steps": 10**8, "checkpoint_every_steps": 200, "eval_every_steps": 500, "log_every": 10}
        # Ends the run if this process is killed.
        alarm = partial(signal.alarm, int(60 * arguments.minutes) + 600)

        def begin(run: Path) -> int:
            return start(run_config(data, run, **often), run.with_suffix(".log"), before=alarm)

        process = begin(out)
        samples, relative = [], []
        began, seconds = time.monotonic(), 60 * arguments.minutes
        fresh_runs = min(FRESH_RUNS, round(arguments.minutes))
        timed = max(MIN_SECONDS, seconds / FRESH_RUNS / 8)
        while (passed := time.monotonic() - began) < seconds:
            if passed > (len(relative) + 0.5) * seconds / fresh_runs:
                relative.append(speed_over_fresh(process, out / "metrics.jsonl", begin, timed))
            time.sleep(min(5.0, seconds / 60))
            samples.append(sample(process, out / "metrics.jsonl"))
        os.kill(process, signal.SIGTERM)
        code = wait(process)
        rows = read_metrics(out / "metrics.jsonl")
        if code:
            print(out.with_suffix(".log").read_text()[-2000:])
    found = verdicts(samples, relative)
    for name, row in found.items():
        verdict = "" if "well" not in row else "well" if row["well"] else "NOT WELL"
        print(f"{name:<18}{row['before']:>12}{row['after']:>12}  {verdict}")
    print(f"{rows[-1]['step']} steps in {arguments.minutes:g} minutes; SIGTERM ended the run with {code}")
    if arguments.json:
        figures = {"minutes": arguments.minutes, "steps": rows[-1]["step"], "exit_code": code, "rows": found}
        write_json(arguments.json, figures)
    sys.exit(0 if code == 0 and all(row.get("well", True) for row in found.values()) else 1)


if __name__ == "__main__":
    main()
