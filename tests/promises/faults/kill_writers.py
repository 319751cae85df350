"""Builds of shards that are killed at random moments and then run again, compared with an uninterrupted build.

    python tests/promises/faults/kill_writers.py builds|parts [--kills 50] [--json FILE]

`builds` are of one machine; `parts` are three parts that are written at once, and their merge. Moments are counted in
events: every file that is opened, renamed or removed, every fsync, and every write to a tar, which then ends half-way.
In a third of the interruptions the disk is full from that moment on instead. Every fourth data set begins with a kill
of a builder that has two worker processes, without or with them. Each builder runs in a fork of this process, which
has everything imported and no threads. The exit code is 1 if bytes differ.
"""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import nvidia.dali.fn  # noqa: F401 (imported before the forks)
from PIL import Image

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm_dataloading import open_dataset
from mvlm_dataloading.build.build import build_part, build_shards, merge_parts
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support.faults.forks import in_child, wait
from support.faults.kill_command import run_kills

IMAGES, PARTS = 40, 3
FINISHED, FULL = 0, 2
OPTIONS = BuildOptions(shard_bytes=40_000, drop_duplicates=True)


def source(folder: Path) -> Source:
    """Pieces of eight records. Two training images are in the test split too, two damaged, two repeated."""
    records = []
    for i in range(IMAGES):
        path = folder / f"{i}.png"
        if not path.exists():
            same = {9: 1, 17: 2, 21: 20, 30: 20}.get(i, i)
            small = np.random.default_rng(same).integers(0, 256, (6, 8, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(file, "PNG")
            path.write_bytes(file.getvalue()[: 300 if i in (12, 26) else None])
        records.append(Record(f"k{i:03d}", path, [f"caption {i}"], path.name))
    pieces = [ListedPiece("test", records[:8])]
    pieces += [ListedPiece("train", records[i : i + 8]) for i in range(8, IMAGES, 8)]
    return Source("kills", "tests", "CC0", {"images": IMAGES}, pieces)


Stage = dict[str, Callable[[int], object]]
"""Works that run at once: each writes the folder of its name, by so many worker processes."""


def builds(images: Path, base: Path) -> list[Stage]:
    return [{"out": lambda workers: build_shards(source(images), base / "out", OPTIONS, workers=workers)}]


def parts(images: Path, base: Path) -> list[Stage]:
    def write(number: int, workers: int) -> None:
        build_part(source(images), base / f"part{number}", (number, PARTS), OPTIONS, workers=workers)

    names = {f"part{number}": number for number in range(1, PARTS + 1)}
    folders = [base / name for name in reversed(names)]
    return [
        {name: partial(write, number) for name, number in names.items()},
        {"out": lambda workers: merge_parts(folders, base / "out")},
    ]


class Moments:
    """Counter of events in this process, which calls `act` at event number `at`."""

    def __init__(self, parent: Path, at: int, act: Callable[[], None]) -> None:
        self.count, self.at, self.act, self.parent = 0, at, act, str(parent)
        self.names: list[int] = []
        """Numbers of the events that make, rename or remove a name."""

    def tick(self, *, name: bool = False) -> bool:
        self.count += 1
        if name:
            self.names.append(self.count)
        return self.count == self.at

    def hook(self, event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.open") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if writes and str(arguments[0]).startswith(self.parent) and self.tick(name=True):
            self.act()

    def install(self) -> None:
        sys.addaudithook(self.hook)
        moments, fsync = self, os.fsync

        class Tar(io.FileIO):
            def write(self, data) -> int:
                if moments.tick():
                    super().write(bytes(data)[: len(data) // 2])
                    moments.act()
                return super().write(data)

        def counted_fsync(handle: int) -> None:
            if moments.tick():
                moments.act()
            fsync(handle)

        os.fsync = counted_fsync
        opened = tarfile.bltn_open  # pyright: ignore[reportAttributeAccessIssue]

        def open_counted(name: str, mode: str) -> Any:
            return Tar(name, mode) if "w" in mode else opened(name, mode)

        patch.object(tarfile, "bltn_open", open_counted).start()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process, in a new process group. Returns its id."""

    def disturbed() -> int:
        try:
            work()
        except DataError as error:
            return FULL if "wanted room to write" in str(error) else 1
        return FINISHED

    return in_child(disturbed, Path(os.devnull))  # the decoder reports each damaged image


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def contents_of_parts(base: Path) -> dict[str, dict[str, str]]:
    folders = [folder for folder in base.glob("part*/pieces/*") if folder.is_dir()]
    return {str(folder.relative_to(base)): contents(folder) for folder in folders}


def count_events(base: Path, work: Callable[[int], object]) -> tuple[int, list[int]]:
    """Do `work` undisturbed. Returns its number of events, and the numbers of those that concern names."""

    def counted() -> None:
        moments = Moments(base, -1, kill)
        moments.install()
        work(0)
        (base.parent / "events").write_text(json.dumps([moments.count, moments.names]))

    assert wait(fork(counted)) == FINISHED
    count, names = json.loads((base.parent / "events").read_text())
    return count, names


def start(base: Path, work: Callable[[int], object], at: int | None, full: bool) -> int:
    """Start a process that is killed at an event, or finds the disk full from there on. Returns its id."""

    def no_room() -> None:
        moments.at = moments.count + 1  # the next event fails too
        raise OSError(28, "No space left on device")

    def disturbed() -> None:
        if at is not None:
            moments.install()
        work(0)

    moments = Moments(base, at or -1, no_room if full else kill)
    return fork(disturbed)


def kill_builder(base: Path, work: Callable[[int], object], at_bytes: int, group: bool) -> int:
    """Kill a builder of two workers, without or with them (`group`), after `at_bytes` bytes. Returns its exit code."""
    process = fork(lambda: work(2))
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        try:
            size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
        except OSError:  # a file was renamed in the meantime
            size = 0
        if size >= at_bytes:
            (os.killpg if group else os.kill)(process, signal.SIGKILL)
            return wait(process)
        time.sleep(0.001)


def trial(
    stages: list[Stage], base: Path, events: dict[str, tuple[int, list[int]]], parallel: int, rng: random.Random
) -> list[str]:
    """Do all works, each interrupted and started again until it ends. Returns the interruptions.

    Args:
        events: what `count_events` gives of each work.
        parallel: a builder with workers is killed first after at most so many bytes; 0: none is.
    """
    story, before = [], {}
    if parallel:
        name, group = rng.choice(list(stages[0])), rng.random() < 0.5
        if kill_builder(base, stages[0][name], rng.randrange(1, parallel), group) == -signal.SIGKILL:
            story.append(f"{name}: kill builder{' and workers' * group}")
    for works in stages:
        waiting = list(works)
        while waiting:
            processes = {}
            for name in waiting:
                count, names = events[name]
                # Most events are writes, but most faults concern names.
                at = rng.choice(names) if rng.random() < 0.5 else rng.randrange(1, count + 1)
                at, full = at if rng.random() < 0.6 else None, rng.random() < 1 / 3
                processes[name] = start(base, works[name], at, full), at, FULL if full else -signal.SIGKILL
            for name, (process, at, interrupted) in processes.items():
                code = wait(process)
                assert code == FINISHED or (at and code == interrupted), (name, at, code, story)
                if code == FINISHED:
                    waiting.remove(name)
                else:
                    story.append(f"{name}: {'full' if code == FULL else 'kill'}@{at}")
            if (base / "out").exists():  # a reader may open the folder once it exists, even if the writer was killed
                assert len(open_dataset(base / "out", "test")) == 8, story
        assert before in ({}, contents_of_parts(base)), "a merge changed a part"
        before = contents_of_parts(base)
    return story


def run_trials(works: Callable[[Path, Path], list[Stage]], folder: Path, kills: int, rng: random.Random) -> Any:
    """Interrupt at least `kills` writers. AssertionError for bytes that are not those of an uninterrupted build."""
    images, base, whole = (folder / name for name in ("images", "run", "whole"))
    images.mkdir()
    source(images)
    whole.mkdir()
    assert wait(fork(lambda: builds(images, whole)[0]["out"](0))) == FINISHED
    wanted = contents(whole / "out")
    # 40 images: 8 for testing; 2 are damaged, 2 are in the test split, 2 are repeated.
    assert [len(open_dataset(whole / "out", split)) for split in ("train", "test")] == [26, 8]
    size = sum(path.stat().st_size for path in (whole / "out").iterdir())
    base.mkdir()
    stages = works(images, base)
    events = {name: count_events(base, work) for stage in stages for name, work in stage.items()}
    done = sets = 0
    while done < kills:
        shutil.rmtree(base)
        base.mkdir()
        story = trial(stages, base, events, size if sets % 4 == 3 else 0, rng)
        done, sets = done + len(story), sets + 1
        found = contents(base / "out")
        assert found == wanted, (story, found.keys() ^ wanted.keys())
        assert {path.name for path in base.iterdir()} == set(events), (story, list(base.iterdir()))
        print(f"data set {sets}: {', '.join(story) or 'undisturbed'}", flush=True)
    print(f"{done} interruptions over {sets} data sets: the bytes of one uninterrupted build")
    counts = {name: count for name, (count, _) in events.items()}
    return {"kills": done, "data_sets": sets, "events": counts, "equal": True}


if __name__ == "__main__":
    kinds = {"builds": builds, "parts": parts}
    sys.exit(run_kills(partial(run_trials, kinds[sys.argv.pop(1)]), __doc__, "writers to interrupt", 50))
