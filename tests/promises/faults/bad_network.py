"""Remote data behind a network and servers that fail: batches must be right, or the run must end with the file's URL.

    python tests/promises/faults/bad_network.py --trials 50 [--json FILE]

Two endpoints on this machine, a web server and an object store (moto's S3), each behind a proxy that spoils answers:
status 500, delays, silence, bodies that end early, lengths that are wrong, closed connections, and a changed byte in
shards and in the index of a split. Each has the data set with that index, and a copy with the indices of its shards
only. In most trials each file fails up to three times in drawn ways, and the batches of an epoch must be those of the
local folder. In every fourth trial one file always fails, and a DataError must name its URL. Every trial begins with an
empty cache, which must hold no damaged file afterwards. Pauses and limits are shortened. The exit code is 1 if anything
differs.

A changed byte in the description or in the index of a shard may pass: nothing has a hash of them.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

import boto3

from mvlm_dataloading import DataError, Loader, Tokenizer, open_dataset
from mvlm_dataloading.dataset import folders
from support.data import wave_tokenizer, write_dataset
from support.faults.faulty_proxy import FAULTS, serve_faulty
from support.faults.kill_command import run_kills
from support.object_store import serve_s3
from support.web_server import serve

MOST = 3  # faults of a file in a trial that must succeed; there are four attempts
IMAGES, BATCH = 24, 8


def batches(place: Path | str, tokenizer: Tokenizer) -> list[str]:
    """A hash of each batch of the first epoch."""
    loader = Loader(open_dataset(place, "train"), tokenizer, batch_size=BATCH, image_size=32, text_length=12, seed=4)
    try:
        found = []
        for _, (batch, _) in zip(range(IMAGES // BATCH), loader, strict=False):
            parts = [batch.sample_id, batch.images, batch.tokens]
            found.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
        return found
    finally:
        loader.close()


class Weather:
    """The faults of a trial: some for each file, or one file that always fails."""

    def __init__(self, rng: random.Random, always: str | None):
        self._rng, self._always, self._lock = rng, always, threading.Lock()
        self._left = Counter[str]()
        self._seen: set[str] = set()

    def choose(self, method: str, path: str) -> str | None:
        with self._lock:
            possible = [fault for fault in FAULTS if fault != "garbled" or path.endswith((".tar", ".index"))]
            if self._always is not None:
                possible.remove("delay")  # a late answer is no fault
                return self._rng.choice(possible) if path.endswith(self._always) else None
            if path not in self._seen:
                self._seen.add(path)
                self._left[path] = self._rng.randrange(MOST + 1)
            if not self._left[path]:
                return None
            self._left[path] -= 1
            return self._rng.choice(possible)


def check_cache(cache: Path, folder: Path) -> None:
    """AssertionError if a file in the cache differs from the data set's."""
    for path in cache.glob("*/*"):
        assert path.suffix in (".json", ".tar", ".idx", ".index", ".lock"), path
        if path.suffix != ".lock":
            assert path.read_bytes() == (folder / path.name).read_bytes(), path


def trial(url: str, folder: Path, cache: Path, tokenizer: Tokenizer, wanted: list[str], always: str | None) -> str:
    """Load an epoch. Returns what happened."""
    os.environ["MVLM_CACHE"] = str(cache)
    begun = time.perf_counter()
    found, message = [], None
    try:
        found = batches(url, tokenizer)
    except DataError as error:
        message = str(error)
    if always is None:
        assert (found, message) == (wanted, None), message
    else:
        assert message is not None, f"{always} always failed, and nobody noticed"
        assert f"{url}/{always}: wanted" in message, message
    check_cache(cache, folder)
    return f"{'right' if message is None else 'DataError'} in {time.perf_counter() - begun:.1f} s"


def run_trials(folder: Path, trials: int, rng: random.Random) -> dict[str, Any]:
    """Run all trials. Returns counts. Raises AssertionError for a trial that went wrong."""
    data = write_dataset(folder / "data", IMAGES, max_shard_bytes=60_000, kinds=("JPEG",))
    tokenizer = wave_tokenizer()
    copy = shutil.copytree(data, folder / "copy")
    (copy / "train.index").unlink()
    wanted = batches(data, tokenizer)
    counts = Counter[str]()
    weather: list[Weather] = []

    def choose(method: str, path: str) -> str | None:
        return weather[-1].choose(method, path) if weather else None

    with serve(folder) as web, serve_s3("pairs") as store, serve_faulty(web, choose) as (bad_web, web_faults):
        client = boto3.client("s3")
        for path in (*data.iterdir(), *copy.iterdir()):
            client.upload_file(str(path), "pairs", f"{path.parent.name}/{path.name}")
        with serve_faulty(store, choose) as (bad_store, store_faults):
            os.environ["AWS_ENDPOINT_URL"] = bad_store
            for number in range(trials):
                served = (data, copy)[number // 2 % 2]
                url = f"{(bad_web, 's3://pairs')[number % 2]}/{served.name}"
                read = [path.name for path in sorted(served.iterdir()) if served == copy or path.suffix != ".idx"]
                always = rng.choice(read) if number % 8 in (4, 7) else None
                weather.append(Weather(random.Random(rng.random()), always))
                cache = folder / f"cache{number}"
                told = trial(url, data, cache, tokenizer, wanted, always)
                counts["ended in DataError" if always else "loaded"] += 1
                print(
                    f"trial {number + 1}: {url.split(':')[0]} {served.name}: {always or 'some of all files'}: {told}",
                    flush=True,
                )
            del weather[:]
    found = {"trials": trials, **counts, "faults of http": dict(web_faults), "faults of s3": dict(store_faults)}
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    for name in ("mvlm_dataloading", "werkzeug"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # So that a trial takes seconds.
    folders.FIRST_PAUSE_S, folders.SILENCE_S = 0.01, 1
    sys.exit(run_kills(run_trials, __doc__, "epochs to load", 50, "--trials"))
