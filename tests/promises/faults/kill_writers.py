"""Kill the writing of shards at random moments, give the same command again, compare with a run that was not killed.

    python tests/promises/faults/kill_writers.py --trials 50

Moments are counted in events: every file that is opened, renamed or removed, every wait for the disk, and every write
to a tar, which then ends half-way. A third of the trials have a disk that is full from that moment on instead; each
tenth kills a run of several processes when so many bytes are there. Each run is a fork of this process, which has
everything imported and nothing started.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import nvidia.dali.fn  # noqa: F401 (imported before the forks)
from PIL import Image

from mvlm_dataloading import open_dataset
from mvlm_dataloading.build.build import build_shards
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import ListedPiece, Record, Source

PICTURES = 40
FINISHED, FULL = 0, 2


def source(folder: Path) -> Source:
    """Pieces of eight records; two of training are in the test split too, two are damaged, two are there twice."""
    records = []
    for i in range(PICTURES):
        path = folder / f"{i}.png"
        if not path.exists():
            same = {9: 1, 17: 2, 21: 20, 30: 20}.get(i, i)
            small = np.random.default_rng(same).integers(0, 256, (6, 8, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(file, "PNG")
            path.write_bytes(file.getvalue()[: 300 if i in (12, 26) else None])
        records.append(Record(f"k{i:03d}", path, [f"caption {i}"], path.name))
    pieces = [ListedPiece("test", records[:8])]
    pieces += [ListedPiece("train", records[i : i + 8]) for i in range(8, PICTURES, 8)]
    return Source("kills", "tests", "CC0", {"pictures": PICTURES}, pieces)


def run(folder: Path, out: Path, workers: int) -> None:
    settings = BuildOptions(shard_bytes=40_000, drop_duplicates=True)
    build_shards(source(folder), out, settings, workers=workers)


class Moments:
    """Counts events in this process, and does something at one of them."""

    def __init__(self, parent: Path, at: int, act: Callable[[], None]) -> None:
        self.count, self._at, self._act, self._parent = 0, at, act, str(parent)
        self.names: list[int] = []
        """The events that make, rename or remove a name."""

    def tick(self, *, name: bool = False) -> bool:
        self.count += 1
        if name:
            self.names.append(self.count)
        return self.count == self._at

    def hook(self, event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.open") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if writes and str(arguments[0]).startswith(self._parent) and self.tick(name=True):
            self._act()

    def install(self) -> None:
        sys.addaudithook(self.hook)
        moments, fsync = self, os.fsync

        class Tar(io.FileIO):
            def write(self, data) -> int:
                if moments.tick():
                    super().write(bytes(data)[: len(data) // 2])
                    moments._act()
                return super().write(data)

        def counted_fsync(handle: int) -> None:
            if moments.tick():
                moments._act()
            fsync(handle)

        os.fsync = counted_fsync
        opened = tarfile.bltn_open  # pyright: ignore[reportAttributeAccessIssue]

        def open_counted(name: str, mode: str) -> Any:
            return Tar(name, mode) if "w" in mode else opened(name, mode)

        patch.object(tarfile, "bltn_open", open_counted).start()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process that has a process group of its own. Returns its id."""
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # both set it, as either may be first
            os.setpgid(process, process)
        return process
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the decoder tells of each damaged picture
    code = 1
    try:
        work()
        code = FINISHED
    except DataError as error:
        code = FULL if "wanted room to write" in str(error) else 1
        if code == 1:
            print(error, flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def count_events(pictures: Path, base: Path) -> tuple[int, list[int]]:
    """Events of a run that is not interrupted, and which of them have to do with names."""

    def work() -> None:
        moments = Moments(base, -1, kill)
        moments.install()
        run(pictures, base / "out", 0)
        (base.parent / "events").write_text(json.dumps([moments.count, moments.names]))

    assert wait(fork(work)) == FINISHED
    count, names = json.loads((base.parent / "events").read_text())
    return count, names


def interrupted(pictures: Path, out: Path, at: int, full: bool) -> int:
    """A run in one process that is killed at an event, or has no more room from there on. Returns how it ended."""

    def no_room() -> None:
        moments._at = moments.count + 1  # the next one too
        raise OSError(28, "No space left on device")

    def work() -> None:
        moments.install()
        run(pictures, out, 0)

    moments = Moments(out.parent, at, no_room if full else kill)
    return wait(fork(work))


def killed_with_its_crew(pictures: Path, out: Path, at_bytes: int, group: bool) -> int:
    """A run of two processes that is killed, alone or with them, when so many bytes are there. Returns how it ended."""
    process = fork(lambda: run(pictures, out, 2))
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        try:
            size = sum(path.stat().st_size for path in out.parent.rglob("*") if path.is_file())
        except OSError:  # it was renamed in the meantime
            size = 0
        if size >= at_bytes:
            (os.killpg if group else os.kill)(process, signal.SIGKILL)
            return wait(process)
        time.sleep(0.001)


def trial(pictures: Path, base: Path, rng: random.Random, events: int, first: int, total_bytes: int, crew: bool) -> str:
    """Interrupt, start again, and perhaps interrupt again, until a run ends. Returns what was done."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    out, story = base / "out", []
    while True:
        full = not crew and rng.random() < 1 / 3
        if crew:
            group = rng.random() < 0.5
            code = killed_with_its_crew(pictures, out, rng.randrange(1, total_bytes), group)
            story.append("crew and all" if group else "crew")
        else:
            at = rng.randrange(1, events + 1) if story else first
            code = interrupted(pictures, out, at, full)
            story.append(f"{'full' if full else 'kill'}@{at}")
        assert code in (FINISHED, FULL, -signal.SIGKILL), (code, story)
        assert full or code != FULL, story
        if out.exists():  # a reader may open what has the name, whatever became of the writer
            assert len(open_dataset(out, "test")) == 8, story
        if code == FINISHED:
            return " ".join(story)
        if rng.random() < 0.6:  # else once more
            assert wait(fork(lambda: run(pictures, out, 0))) == FINISHED, story
            return " ".join([*story, "finished"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-kills-") as name:
        folder = Path(name)
        pictures, base = folder / "pictures", folder / "run"
        pictures.mkdir()
        source(pictures)
        base.mkdir()
        events, names = count_events(pictures, base)
        wanted = contents(base / "out")
        # 40 pictures, less 2 damaged, 2 in the test split, 2 there before.
        samples = [len(open_dataset(base / "out", split)) for split in ("train", "test")]
        assert samples == [26, 8], samples
        total_bytes = sum(path.stat().st_size for path in (base / "out").iterdir())
        rng = random.Random(given.seed)
        for number in range(given.trials):
            # Most events are writes, and most of what can go wrong is a name: the first interruptions are spread over
            # the events that have to do with names.
            first = names[int((number + rng.random()) / given.trials * len(names))]
            story = trial(pictures, base, rng, events, first, total_bytes, crew=number % 10 == 9)
            found = contents(base / "out")
            assert found == wanted, (story, found.keys() ^ wanted.keys())
            assert [path.name for path in base.iterdir()] == ["out"], (story, list(base.iterdir()))
            print(f"trial {number + 1}: {story}", flush=True)
        print(f"{given.trials} trials over {events} events: every data set equal to that of an uninterrupted run")


if __name__ == "__main__":
    main()
