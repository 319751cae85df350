"""The cache of remote data: locks, room, retries and files, with a local web server."""

import gc
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, open_dataset, tokenizer_for
from mvlm_dataloading.dataset.remote_cache import RemoteCache
from mvlm_dataloading.dataset.sample_index import most_bytes
from mvlm_dataloading.files import sha256
from support.data import limit_cache, tree_bytes
from support.faults.forks import in_child, wait
from support.hostile_web import Hostile, serve_hostile
from support.web_server import FolderHandler


def shards_of(folder: Path) -> list[dict]:
    return json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"]


@pytest.fixture
def opened(served, web, data_cache, monkeypatch) -> Callable[[float], RemoteCache]:
    """A function that opens the cache as another job does, with room for so many of the largest shards."""

    def open_cache(room: float) -> RemoteCache:
        cached = RemoteCache(web, data_cache, limit_cache(monkeypatch, served, room))
        cached.register_shards(shards_of(served))
        return cached

    return open_cache


@contextmanager
def changed(path: Path) -> Iterator[dict]:
    """The description in `path`, which is written as it is changed, and restored at the end."""
    kept = path.read_text()
    try:
        yield json.loads(kept)
    finally:
        path.write_text(kept)


def test_the_tokenizer_of_a_remote_data_set_is_fetched(served, web, data_cache, waves_tokenizer):
    path = served / "tokenizer.json"
    with changed(served / "dataset.json") as description:
        waves_tokenizer.save(path)
        content = path.read_bytes()
        description["tokenizer"] = hashlib.sha256(content).hexdigest()
        (served / "dataset.json").write_text(json.dumps(description))
        path.write_bytes(content[:-1])  # during the copy: a damaged one is not kept
        dataset = open_dataset(web, "train")
        with pytest.raises(DataError, match=rf"{web}/tokenizer\.json: .* 4 attempts failed: sha256"):
            tokenizer_for(dataset, 300)
        path.write_bytes(content)
        for _ in range(2):
            assert tokenizer_for(dataset, 300).fingerprint == waves_tokenizer.fingerprint
        assert FolderHandler.asked.count("/tokenizer.json") == 5
        path.unlink()


@pytest.mark.parametrize(
    "own, message", [({}, "tar: .*, not a file inside"), ({"index": "train-000000.idx"}, "wanted tars inside")]
)
def test_remote_shards_outside_the_folder_are_refused(served, web, data_cache, own, message):
    """Also those of a view, which may name tars of other folders where it is local."""
    with changed(served / "dataset.json") as description:
        description["splits"]["train"]["shards"][0] |= {"tar": "../../stolen.tar", **own}
        (served / "dataset.json").write_text(json.dumps(description))
        with pytest.raises(DataError, match=message):
            open_dataset(web, "train")


def test_a_shard_held_by_one_process_is_not_removed_by_another(served, opened, data_cache):
    """Two jobs share a cache with room for two shards."""
    one, two = opened(2.2), opened(2.2)
    one.fetch([0])
    two.fetch([1])
    with pytest.raises(DataError, match="wanted room"):
        two.fetch([2])
    asked = len(FolderHandler.asked)
    two.fetch([0])  # cached already
    assert len(FolderHandler.asked) == asked
    one.release_except([])
    with pytest.raises(DataError, match="wanted room"):  # the other still holds it
        one.fetch([3])
    two.release_except([0])
    one.fetch([3])  # in place of 1, which nobody holds
    shards = shards_of(served)
    assert sorted(path.name for path in data_cache.glob("*/*.tar")) == [shards[0]["tar"], shards[3]["tar"]]
    one.release_except([])
    two.release_except([])


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """A list that gets the bytes of all files in a folder, again and again while the context lasts."""
    found, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            found.append(tree_bytes(folder))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        over.set()
        watching.join()


def test_the_bound_holds_for_all_files_at_every_moment(served, web, data_cache, monkeypatch):
    """An index as large as the cache, whose length may be stated or not, takes the room of shards before it comes."""
    size = limit_cache(monkeypatch, served, 2.3)
    first = RemoteCache(web, data_cache, size)
    first.register_shards(shards_of(served))
    first.fetch([0, 1])
    first.release_except([])

    def slowly(web: Hostile, content: bytes) -> None:
        web.head(200, {"Content-Length": str(most_bytes(48, len(shards_of(served))))} if web.asked[""] % 2 else {})
        web.asked[""] += 1
        for _ in range(20):
            web.body(bytes(len(content)))
            time.sleep(0.005)

    with watched(data_cache) as found, serve_hostile(served, {"train.index": slowly}) as (url, _):
        with pytest.raises(DataError, match=r"train\.index: wanted .*4 attempts failed"):
            open_dataset(url, "train")
        second = RemoteCache(url, data_cache, size)
        second.register_shards(shards_of(served))
        second.fetch([2, 3])
    assert max(found) <= size
    assert max(found) > 0.8 * size

    def whole(web: Hostile, content: bytes) -> None:
        web.head(200, {"Content-Length": str(size)})
        for _ in web.until_over():
            web.body(bytes(1 << 16))

    with watched(data_cache) as found, serve_hostile(served, {"train.index": whole}) as (url, _):
        monkeypatch.setattr("mvlm_dataloading.dataset.remote_cache.most_bytes", lambda samples, shards: size)
        with pytest.raises(DataError, match="wanted room"):  # as the description has some, too
            open_dataset(url, "train")
    assert max(found) <= size


def test_indices_make_room_unless_a_process_has_them_open(served, data_cache, monkeypatch):
    """Indices that were used least recently go first. A data set of an older cache, without a lock, is the oldest."""
    size = limit_cache(monkeypatch, served, 1.3)
    (data_cache / ("0" * 24)).mkdir(parents=True)
    (data_cache / ("0" * 24) / "train.index").write_bytes(bytes(2000))
    with serve_hostile(served, {}) as (one, _), serve_hostile(served, {}) as (two, _):
        held, left = open_dataset(one, "train"), open_dataset(two, "train")
        assert held.remote is not None
        assert left.remote is not None
        other = left.remote.folder
        del left
        gc.collect()  # a data set and its cache refer to each other
        monkeypatch.setattr(held.remote, "limit", tree_bytes(held.folder) + shards_of(served)[0]["bytes"])
        held.remote.fetch([0])
    assert [path.name for path in data_cache.glob("*/train.index")] == ["train.index"]
    assert (held.folder / "train.index").is_file()
    assert not (other / "dataset.json").exists()
    assert tree_bytes(data_cache) <= size


def fetch_in_turns(cached: RemoteCache, shards: list[dict], seed: int) -> None:
    """Fetch, verify and release shards, in an order that depends on the seed."""
    cached.register_shards(shards)
    for turn in range(10):
        number = (turn * 7 + seed * 3) % len(shards)
        while True:
            try:
                cached.fetch([number])
                break
            except DataError:  # the other jobs hold all the room
                cached.release_except([])
                time.sleep(0.01)
        assert sha256(cached.folder / shards[number]["tar"]) == shards[number]["sha256"]
        cached.release_except([number])


@pytest.mark.slow
def test_jobs_can_share_a_remote_cache(served, web, data_cache, monkeypatch):
    """Three processes work concurrently, with room for three shards."""
    size, shards = limit_cache(monkeypatch, served, 3.2), shards_of(served)
    jobs = [
        in_child(lambda seed=seed: fetch_in_turns(RemoteCache(web, data_cache, size), shards, seed))
        for seed in range(3)
    ]
    assert [wait(job, 60) for job in jobs] == [0, 0, 0]
    assert tree_bytes(data_cache) <= size


def test_a_shard_that_was_removed_while_held_is_fetched_again(served, web, data_cache):
    """Somebody makes room on the disk. Its own lock must not keep the process waiting."""
    dataset = open_dataset(web, "train")
    assert dataset.remote is not None
    dataset.remote.fetch([0])
    for tar in data_cache.glob("*/*.tar"):
        tar.unlink()
    found: list[list[str]] = []
    reader = threading.Thread(target=lambda: found.append(dataset.captions(0)), daemon=True)
    reader.start()
    reader.join(20)
    assert found == [open_dataset(served, "train").captions(0)]
    dataset.remote.fetch([0])
    for tar in data_cache.glob("*/*.tar"):
        tar.unlink()
    dataset.remote.fetch([0])
    assert len(list(data_cache.glob("*/*.tar"))) == 1


def test_the_umask_decides_who_may_share_a_cache(web, data_cache):
    before = os.umask(0o002)
    try:
        dataset = open_dataset(web, "train")
        assert dataset.remote is not None
        dataset.remote.fetch([0])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in data_cache.glob("*/*")}
    assert "train-000000.tar.lock" in modes
    assert set(modes.values()) == {0o664}


def test_a_cache_that_cannot_be_written_is_named(web, data_cache):
    data_cache.write_text("a file")
    with pytest.raises(DataError, match=f"{data_cache}: wanted a cache folder that can be written.*; set MVLM_CACHE"):
        open_dataset(web, "train")
