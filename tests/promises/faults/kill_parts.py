"""Parts of a data set, and merges of them, that are killed at random moments: all must equal one machine's build.

    python tests/promises/faults/kill_parts.py --kills 20 [--json FILE]

A trial writes the three parts of the data set of `kill_writers` by processes of their own, at once, and merges them.
Each process is killed at a drawn event (see `kill_writers`) and started again until it ends, so a part is resumed while
others run. Parts must be the same after a merge as before. Every other trial kills a part of two worker processes, with
or without these, at a drawn time. The exit code is 1 if bytes differ.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nvidia.dali.fn  # noqa: F401 (imported before the forks)

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm
sys.path.insert(0, str(Path(__file__).parent))

from kill_writers import FINISHED, Moments, contents, count_events, fork, kill, run, source

from mvlm_dataloading.build.build import build_part, merge_parts
from mvlm_dataloading.options import BuildOptions
from support.faults.forks import wait
from support.faults.kill_command import run_kills

PARTS = 3
OPTIONS = BuildOptions(shard_bytes=40_000, drop_duplicates=True)
MERGE = 0


def work(images: Path, base: Path, number: int, workers: int = 0) -> None:
    """Write part `number`, from 1, or merge the parts for number 0."""
    if number == MERGE:
        merge_parts([base / f"part{i}" for i in range(PARTS, 0, -1)], base / "out")
    else:
        build_part(source(images), base / f"part{number}", (number, PARTS), OPTIONS, workers=workers)


def start(images: Path, base: Path, number: int, at: int | None) -> int:
    """Start a process that is killed at an event, or that is left alone. Returns its id."""

    def disturbed() -> None:
        if at is not None:
            Moments(base, at, kill).install()
        work(images, base, number)

    return fork(disturbed)


def kill_workers(images: Path, base: Path, number: int, rng: random.Random) -> int:
    """Kill a part of two worker processes, without or with them. Returns 1 if it was killed before its end."""
    process = fork(lambda: work(images, base, number, workers=2))
    time.sleep(rng.uniform(0.2, 4))
    (os.killpg if rng.random() < 0.5 else os.kill)(process, signal.SIGKILL)
    return int(wait(process) == -signal.SIGKILL)


def trial(images: Path, base: Path, events: list[int], parallel: bool, rng: random.Random) -> int:
    """Write all parts and merge them, with kills. Returns the number of kills."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    kills = kill_workers(images, base, rng.randrange(1, PARTS + 1), rng) if parallel else 0
    before: dict[str, dict[str, str]] = {}
    for numbers in (list(range(1, PARTS + 1)), [MERGE]):
        while numbers:
            moments = {i: rng.randrange(1, events[i] + 1) if rng.random() < 0.6 else None for i in numbers}
            processes = {i: start(images, base, i, at) for i, at in moments.items()}
            ended = {i: wait(process) for i, process in processes.items()}
            assert set(ended.values()) <= {FINISHED, -signal.SIGKILL}, ended
            kills += list(ended.values()).count(-signal.SIGKILL)
            numbers = [i for i in numbers if ended[i] != FINISHED]
            assert MERGE not in ended or contents_of_parts(base) == before, "a merge changed a part"
        before = contents_of_parts(base)
    left = sorted(path.name for path in base.iterdir())
    assert left == ["out", *(f"part{i}" for i in range(1, PARTS + 1))], left
    return kills


def contents_of_parts(base: Path) -> dict[str, dict[str, str]]:
    folders = [folder for folder in base.glob("part*/pieces/*") if folder.is_dir()]
    return {str(folder.relative_to(base)): contents(folder) for folder in folders}


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | dict[str, Any]:
    """Kill `kills` processes. Returns the difference from one machine's build, or the figures."""
    images, base = folder / "images", folder / "run"
    images.mkdir()
    source(images)
    base.mkdir()
    assert wait(fork(lambda: run(images, folder / "whole", 0))) == FINISHED
    wanted = contents(folder / "whole")
    events = [count_events(base, lambda number=number: work(images, base, number))[0] for number in (1, 2, 3, MERGE)]
    events = [events[-1], *events[:-1]]
    killed = trials = 0
    while killed < kills:
        more = trial(images, base, events, trials % 2 == 1, rng)
        killed, trials = killed + more, trials + 1
        found = contents(base / "out")
        if found != wanted:
            return f"files differ: {sorted(n for n in found.keys() | wanted if found.get(n) != wanted.get(n))}"
        print(f"trial {trials}: {more} kills", flush=True)
    print(f"{killed} kills over {trials} data sets of {PARTS} parts: the bytes of one machine's build")
    return {"kills": killed, "data_sets": trials, "parts": PARTS, "events": events, "equal": True}


if __name__ == "__main__":
    sys.exit(run_kills(run_trials, __doc__, "processes to kill", 20))
