"""Parts of a data set, and merges of them, that are killed at random moments: all must equal one machine's build.

    python tests/promises/faults/kill_parts.py --kills 20 [--json FILE]

A trial writes the three parts of the data set of `kill_writers` by processes of their own, at once, and merges them.
Each process is killed at a drawn event (see `kill_writers`) and started again until it ends, so a part is resumed while
others run. Parts must be the same after a merge as before. Every other trial kills a part of two worker processes, with
or without these, at a drawn time. The exit code is 1 if bytes differ.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import nvidia.dali.fn  # noqa: F401 (imported before the forks)

sys.path.insert(0, str(Path(__file__).parent))

from kill_writers import FINISHED, Moments, contents, fork, kill, run, source, wait

from mvlm_dataloading.build.build import build_part, merge_parts
from mvlm_dataloading.options import BuildOptions

PARTS = 3
OPTIONS = BuildOptions(shard_bytes=40_000, drop_duplicates=True)
MERGE = 0


def work(images: Path, base: Path, number: int, workers: int = 0) -> None:
    """Write part `number`, from 1, or merge the parts for number 0."""
    if number == MERGE:
        merge_parts([base / f"part{i}" for i in range(PARTS, 0, -1)], base / "out")
    else:
        build_part(source(images), base / f"part{number}", (number, PARTS), OPTIONS, workers=workers)


def count_events(images: Path, base: Path, number: int) -> int:
    """Number of events of an undisturbed process."""

    def counted() -> None:
        moments = Moments(base, -1, kill)
        moments.install()
        work(images, base, number)
        (base.parent / "events").write_text(str(moments.count))

    assert wait(fork(counted)) == FINISHED
    return int((base.parent / "events").read_text())


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    rng, kills, trials = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="mvlm-parts-") as name:
        images, base = Path(name) / "images", Path(name) / "run"
        images.mkdir()
        source(images)
        base.mkdir()
        assert wait(fork(lambda: run(images, Path(name) / "whole", 0))) == FINISHED
        wanted = contents(Path(name) / "whole")
        events = [count_events(images, base, number) for number in (*range(1, PARTS + 1), MERGE)]
        events = [events[-1], *events[:-1]]
        while kills < given.kills:
            more = trial(images, base, events, trials % 2 == 1, rng)
            kills, trials = kills + more, trials + 1
            found = contents(base / "out")
            if found != wanted:
                print(
                    "files differ: ",
                    sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)),
                )
                return 1
            print(f"trial {trials}: {more} kills", flush=True)
    print(f"{kills} kills over {trials} data sets of {PARTS} parts: the bytes of one machine's build")
    if given.json:
        result = {"kills": kills, "data_sets": trials, "parts": PARTS, "events": events, "equal": True}
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
