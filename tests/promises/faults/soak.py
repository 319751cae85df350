"""A soak: one run for hours on small data, watched from outside. Memory and speed have to stay flat, nothing may leak.

    python tests/promises/faults/soak.py --minutes 120 --json benchmarks/results/soak.json

Memory is flat when its median over the last fifth of the time is within 5 % of that over the second fifth, speed when
its median is within 10 %; open files, threads and processes may not be more, but for those of one save. Speed is judged
by pairs for a second of processor time over those of the same run begun anew, for a moment, beside it: other work on
the machine, on caches that programs share, changes both alike. Plain speeds are reported.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from campaign import DATA
from zygote import Trial, configuration, spawn

from mvlm.runs.folder import read_metrics

FRESH_RUNS = 30
"""Runs begun anew to compare with, over all of the time."""
WARM_UP_PAIRS = 2000
"""Of each: some ten seconds."""
SLACK = 4
"""Files or threads more than at the start that a save in progress accounts for."""


def look(process: int, metrics: Path) -> dict[str, float]:
    """Memory in MB, open files, threads, children and seconds of processor time of a process now, and its pairs."""
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


def beside(process: int, metrics: Path, fresh: Trial, seconds: float) -> float:
    """The speed of a process over that of a fresh run beside it, once that is warm, in pairs for a second of processor
    time."""
    of_fresh = fresh.config.out / "metrics.jsonl"
    other = spawn(fresh)
    try:
        while last_pairs(of_fresh) < WARM_UP_PAIRS:
            time.sleep(0.1)
            if os.waitpid(other, os.WNOHANG)[0]:
                raise RuntimeError(fresh.log.read_text()[-2000:])
        began = look(process, metrics), look(other, of_fresh)
        time.sleep(seconds)
        ended = look(process, metrics), look(other, of_fresh)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    own, its = (rates([a, b], "cpu_s")[0] for a, b in zip(began, ended, strict=True))
    return own / its


def last_pairs(metrics: Path) -> float:
    """Pairs seen by the last whole line of metrics.jsonl; 0 before there is one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["pairs_seen"] if lines else 0


def rates(looks: list[dict[str, float]], by: str) -> list[float]:
    """Pairs for a unit of `by` between looks a minute or so apart."""
    apart = max(1, len(looks) // 100)
    pairs = [(a, b) for a, b in zip(looks[::apart], looks[apart::apart], strict=False) if b[by] > a[by]]
    return [(b["pairs"] - a["pairs"]) / (b[by] - a[by]) for a, b in pairs]


def fifth(values: list[float], number: int) -> float:
    """The median of the fifth of the values with this number, from 0."""
    part = values[len(values) * number // 5 : len(values) * (number + 1) // 5]
    return median(part)


def verdicts(looks: list[dict[str, float]], relative: list[float]) -> dict[str, dict[str, float | bool]]:
    """For each thing that has to stay as it was: what it was, what it is, and whether that is well.

    `relative` are speeds over those of fresh runs, as `beside` gives them.
    """
    found: dict[str, dict[str, float | bool]] = {}
    for name, values, share in (
        ("memory_mb", [look["memory_mb"] for look in looks], 0.05),
        ("speed_over_fresh", relative, 0.10),
    ):
        before, after = fifth(values, 1), fifth(values, 4)
        found[name] = {"before": round(before, 2), "after": round(after, 2), "well": abs(after / before - 1) <= share}
    for name in ("files", "threads", "children"):
        values = [look[name] for look in looks]
        before, after = fifth(values, 1), fifth(values, 4)
        found[name] = {"before": before, "after": after, "well": after <= before + SLACK}
    for name, by in (("pairs_per_cpu_s", "cpu_s"), ("pairs_per_s", "time")):
        speeds = rates(looks, by)
        found[name] = {"before": round(fifth(speeds, 1), 2), "after": round(fifth(speeds, 4), 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-soak-") as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        shutil.copytree(DATA, data)
        for index in data.glob("*.idx"):
            os.utime(index)
        often = {"max_steps": 10**8, "checkpoint_every_steps": 200, "eval_every_steps": 500, "log_every": 10}
        # If this process is killed, the run ends on its own.
        alarm = partial(signal.alarm, int(60 * arguments.minutes) + 600)
        process = spawn(Trial(configuration(data, out, **often), Path(folder) / "log", before=alarm))
        looks, relative = [], []
        began, seconds = time.monotonic(), 60 * arguments.minutes
        while (passed := time.monotonic() - began) < seconds:
            if passed > (len(relative) + 0.5) * seconds / FRESH_RUNS:
                again = Path(folder) / f"fresh-{len(relative)}"
                trial = Trial(configuration(data, again, **often), again.with_suffix(".log"), before=alarm)
                relative.append(beside(process, out / "metrics.jsonl", trial, seconds=seconds / FRESH_RUNS / 8))
                shutil.rmtree(again)
            time.sleep(min(5.0, seconds / 60))
            looks.append(look(process, out / "metrics.jsonl"))
        os.kill(process, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        rows = read_metrics(out / "metrics.jsonl")
        if code:
            print((Path(folder) / "log").read_text()[-2000:])
    found = verdicts(looks, relative)
    for name, row in found.items():
        verdict = "" if "well" not in row else "well" if row["well"] else "NOT WELL"
        print(f"{name:<18}{row['before']:>12}{row['after']:>12}  {verdict}")
    print(f"{rows[-1]['step']} steps in {arguments.minutes:g} minutes; SIGTERM ended the run with {code}")
    if arguments.json:
        figures = {"minutes": arguments.minutes, "steps": rows[-1]["step"], "exit_code": code, "rows": found}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if code == 0 and all(row.get("well", True) for row in found.values()) else 1)


if __name__ == "__main__":
    main()
