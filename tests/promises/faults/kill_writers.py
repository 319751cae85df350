"""Builds of shards that are killed at random moments and then run again, compared with an uninterrupted build.

    python tests/promises/faults/kill_writers.py --trials 50

Moments are counted in events: every file that is opened, renamed or removed, every fsync, and every write to a tar,
which then ends half-way. In a third of the trials the disk is full from that moment on instead. Every tenth trial kills
a build of several processes once it has written a drawn number of bytes. Each build runs in a fork of this process,
which has everything imported and no threads.
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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import nvidia.dali.fn  # noqa: F401 (imported before the forks)
from PIL import Image

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm_dataloading import open_dataset
from mvlm_dataloading.build.build import build_shards
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support.faults.forks import in_child, wait
from support.faults.kill_command import run_kills

IMAGES = 40
FINISHED, FULL = 0, 2


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


def run(folder: Path, out: Path, workers: int) -> None:
    settings = BuildOptions(shard_bytes=40_000, drop_duplicates=True)
    build_shards(source(folder), out, settings, workers=workers)


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


def fork(work: Callable[[], None]) -> int:
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


def count_events(base: Path, work: Callable[[], None]) -> tuple[int, list[int]]:
    """Do `work` undisturbed. Returns its number of events, and the numbers of those that concern names."""

    def counted() -> None:
        moments = Moments(base, -1, kill)
        moments.install()
        work()
        (base.parent / "events").write_text(json.dumps([moments.count, moments.names]))

    assert wait(fork(counted)) == FINISHED
    count, names = json.loads((base.parent / "events").read_text())
    return count, names


def interrupted(images: Path, out: Path, at: int, full: bool) -> int:
    """Kill a build in one process at an event, or let it find the disk full from there on. Returns its exit code."""

    def no_room() -> None:
        moments.at = moments.count + 1  # the next event fails too
        raise OSError(28, "No space left on device")

    def work() -> None:
        moments.install()
        run(images, out, 0)

    moments = Moments(out.parent, at, no_room if full else kill)
    return wait(fork(work))


def kill_builder(images: Path, out: Path, at_bytes: int, group: bool) -> int:
    """Kill a build of two workers, without or with them (`group`), after `at_bytes` bytes. Returns its exit code."""
    process = fork(lambda: run(images, out, 2))
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        try:
            size = sum(path.stat().st_size for path in out.parent.rglob("*") if path.is_file())
        except OSError:  # a file was renamed in the meantime
            size = 0
        if size >= at_bytes:
            (os.killpg if group else os.kill)(process, signal.SIGKILL)
            return wait(process)
        time.sleep(0.001)


def trial(
    images: Path, base: Path, rng: random.Random, events: int, first: int, total_bytes: int, parallel: bool
) -> str:
    """Interrupt a build, run it again, perhaps interrupt it again, until it ends. Returns what was done."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    out, story = base / "out", []
    while True:
        full = not parallel and rng.random() < 1 / 3
        if parallel:
            group = rng.random() < 0.5
            code = kill_builder(images, out, rng.randrange(1, total_bytes), group)
            story.append("kill builder and workers" if group else "kill builder")
        else:
            at = rng.randrange(1, events + 1) if story else first
            code = interrupted(images, out, at, full)
            story.append(f"{'full' if full else 'kill'}@{at}")
        assert code in (FINISHED, FULL, -signal.SIGKILL), (code, story)
        assert full or code != FULL, story
        if out.exists():  # a reader may open the folder once it exists, even if the writer was killed
            assert len(open_dataset(out, "test")) == 8, story
        if code == FINISHED:
            return " ".join(story)
        if rng.random() < 0.6:  # else interrupt once more
            assert wait(fork(lambda: run(images, out, 0))) == FINISHED, story
            return " ".join([*story, "finished"])


def run_trials(folder: Path, trials: int, rng: random.Random) -> None:
    """Interrupt `trials` builds. AssertionError for a data set that differs from that of an uninterrupted one."""
    images, base = folder / "images", folder / "run"
    images.mkdir()
    source(images)
    base.mkdir()
    events, names = count_events(base, lambda: run(images, base / "out", 0))
    wanted = contents(base / "out")
    # 40 images: 8 for testing; 2 are damaged, 2 are in the test split, 2 are repeated.
    samples = [len(open_dataset(base / "out", split)) for split in ("train", "test")]
    assert samples == [26, 8], samples
    total_bytes = sum(path.stat().st_size for path in (base / "out").iterdir())
    for number in range(trials):
        # Most events are writes, but most faults concern names: the first interruptions are spread over the events that
        # concern names.
        first = names[int((number + rng.random()) / trials * len(names))]
        story = trial(images, base, rng, events, first, total_bytes, parallel=number % 10 == 9)
        found = contents(base / "out")
        assert found == wanted, (story, found.keys() ^ wanted.keys())
        assert [path.name for path in base.iterdir()] == ["out"], (story, list(base.iterdir()))
        print(f"trial {number + 1}: {story}", flush=True)
    print(f"{trials} trials over {events} events: every data set equals that of an uninterrupted build")


if __name__ == "__main__":
    sys.exit(run_kills(run_trials, __doc__, "builds to interrupt", 50, "--trials"))
