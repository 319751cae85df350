"""The cache of remote data, with local servers: an object store and a web server."""

import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvlm_dataloading import DataError, Loader, open_dataset, tokenizer_for
from mvlm_dataloading.dataset import remote_cache
from mvlm_dataloading.dataset.remote_cache import RemoteCache, is_remote
from mvlm_dataloading.loader import reader, sampler
from support.data import write_dataset


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of a folder's files. It records requests, and fails once for each path in `fail`."""

    asked: list[str] = []  # noqa: RUF012
    fail: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path in self.fail:
            self.fail.remove(self.path)
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images in several shards."""
    folder = tmp_path_factory.mktemp("elsewhere") / "data"
    write_dataset(folder, 48, max_shard_bytes=60_000, kinds=("JPEG",))
    assert len(list(folder.glob("*.tar"))) >= 5
    return folder


@pytest.fixture
def web(folder):
    Quiet.asked.clear()
    Quiet.fail.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_cache, "FIRST_PAUSE_S", 0.01)
    return tmp_path / "cache"


def limit_to(monkeypatch, folder, shards: float) -> int:
    """Set the cache size to that of `shards` of the largest shards."""
    size = int(shards * max(tar.stat().st_size for tar in folder.glob("*.tar")))
    monkeypatch.setenv("MVLM_CACHE_GB", repr(size / 1e9))
    return size


def batches(dataset, tokenizer, count: int):
    loader = Loader(dataset, tokenizer, batch_size=8, image_size=32, text_length=12, seed=4)
    found = list(itertools.islice(loader, count))
    loader.close()
    return found


def assert_equal(found, wanted) -> None:
    assert len(found) == len(wanted)
    for (a, _), (b, _) in zip(found, wanted, strict=True):
        assert a.sample_id.tolist() == b.sample_id.tolist()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


def used(cache) -> int:
    """Bytes of the shards in a cache. Files may vanish meanwhile."""
    sizes = []
    for path in cache.glob("*/*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size if path.suffix != ".lock" else 0)
    return sum(sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's and the client's packages
def test_an_object_store_serves_a_data_set(folder, cache, tokenizer, monkeypatch):
    """S3 through boto, over several epochs, with a cache that holds all shards."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        store = boto3.client("s3")
        store.create_bucket(Bucket="pairs")
        for path in folder.iterdir():
            store.upload_file(str(path), "pairs", f"deep/{path.name}")
        dataset = open_dataset("s3://pairs/deep", "train")
        assert not list(cache.glob("*/*.tar"))  # before they are needed
        assert_equal(batches(dataset, tokenizer, 15), batches(open_dataset(folder, "train"), tokenizer, 15))
        assert len(list(cache.glob("*/*.tar"))) == len(dataset.tars)
        with pytest.raises(DataError, match=r"s3://pairs/none/dataset.json: wanted a file that the data set needs"):
            open_dataset("s3://pairs/none", "train")
    finally:
        server.stop()


@pytest.mark.slow
def test_several_epochs_from_a_web_server_through_a_small_cache(folder, web, cache, tokenizer, monkeypatch):
    monkeypatch.setattr(sampler, "GROUP", 1)
    monkeypatch.setattr(reader, "FIRST_SEGMENT_BATCHES", 1)
    monkeypatch.setattr(reader, "MAX_SEGMENT_SAMPLES", 8)
    size = limit_to(monkeypatch, folder, 4.5)
    dataset = open_dataset(web, "train")
    wanted = batches(open_dataset(folder, "train"), tokenizer, 24)
    found = []
    loader = Loader(dataset, tokenizer, batch_size=8, image_size=32, text_length=12, seed=4)
    for batch in itertools.islice(loader, 24):  # four epochs
        found.append(batch)
        assert used(cache) <= size
    loader.close()
    assert_equal(found, wanted)
    tars = [path for path in Quiet.asked if path.endswith(".tar")]
    assert set(tars) == {f"/{tar.name}" for tar in dataset.tars}
    assert len(tars) > len(dataset.tars)  # some were removed and came again
    assert not list(cache.glob("*/*.part"))


def test_remote_shards_are_fetched_ahead_of_use(folder, web, cache, tokenizer, monkeypatch):
    monkeypatch.setattr(sampler, "GROUP", 1)
    monkeypatch.setattr(reader, "FIRST_SEGMENT_BATCHES", 1)
    monkeypatch.setattr(reader, "MAX_SEGMENT_SAMPLES", 8)
    loader = Loader(open_dataset(web, "train"), tokenizer, batch_size=8, image_size=32, text_length=12, seed=4, ahead=0)
    batch, _ = next(iter(loader))
    for thread in threading.enumerate():
        if thread.name == "mvlm-fetching":
            thread.join(10)
    here = {path.name for path in cache.glob("*/*.tar")}
    in_use = {loader.dataset.tars[loader.dataset.shard[i]].name for i in batch.sample_id.tolist()}
    assert in_use < here
    loader.close()


def test_a_remote_cache_that_is_too_small_is_refused(folder, web, cache, tokenizer, monkeypatch):
    limit_to(monkeypatch, folder, 1.5)
    with pytest.raises(
        DataError, match=r"wanted room for \d+ bytes more, found \d+ of \d+ in use; raise MVLM_CACHE_GB"
    ):
        batches(open_dataset(web, "train"), tokenizer, 1)
    for size in ("much", "inf", "1e300", "nan", "-1", "0"):
        monkeypatch.setenv("MVLM_CACHE_GB", size)
        with pytest.raises(DataError, match=f"MVLM_CACHE_GB: wanted a number of gigabytes above 0, got '{size}'"):
            open_dataset(web, "train")


def test_a_failed_fetch_is_retried(folder, web, cache, tokenizer):
    names = sorted(f"/{path.name}" for path in folder.glob("train*"))
    Quiet.fail += ["/dataset.json", *names, *names]
    dataset = open_dataset(web, "train")
    assert_equal(batches(dataset, tokenizer, 6), batches(open_dataset(folder, "train"), tokenizer, 6))
    assert not Quiet.fail
    Quiet.fail += ["/dataset.json"] * 4
    with pytest.raises(DataError, match=r"dataset\.json: wanted to read it, failed 4 times"):
        open_dataset(web, "train")


def test_a_remote_shard_with_other_bytes_is_refused(folder, web, cache, tokenizer):
    tar = sorted(folder.glob("*.tar"))[2]
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:-1] + b"x")
        with pytest.raises(
            DataError, match=rf"{tar.name}: wanted to read it, failed 4 times: sha256 .* where dataset.json"
        ):
            batches(open_dataset(web, "train"), tokenizer, 6)
        assert not [path for path in cache.glob("*/*") if path.name.startswith(tar.name) and path.suffix != ".lock"]
    finally:
        tar.write_bytes(content)
        os.utime(tar.with_suffix(".idx"))


def test_a_damaged_cached_index_is_fetched_again(folder, web, cache, tokenizer):
    open_dataset(web, "train")
    first, *_, last = sorted(cache.glob("*/*.idx"))
    first.write_bytes(b"")
    last.write_bytes(last.read_bytes().replace(b"jpg", b"gif"))
    found = batches(open_dataset(web, "train"), tokenizer, 6)
    assert_equal(found, batches(open_dataset(folder, "train"), tokenizer, 6))


def test_a_cached_index_of_another_tar_is_noticed_and_removed(folder, web, cache, tokenizer):
    wanted = batches(open_dataset(folder, "train"), tokenizer, 6)
    shards = json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"]
    by_count = {}
    for shard in shards:
        by_count.setdefault(shard["samples"], []).append((folder / shard["tar"]).with_suffix(".idx"))
    one, two, *_ = next(paths for paths in by_count.values() if len(paths) > 1)
    kept = one.read_bytes()
    try:
        one.write_bytes(two.read_bytes())
        for _ in range(2):
            with pytest.raises(DataError, match=rf"{one.name}: wanted the index of .*; open the data set again, which"):
                batches(open_dataset(web, "train"), tokenizer, 6)
    finally:
        one.write_bytes(kept)
    assert_equal(batches(open_dataset(web, "train"), tokenizer, 6), wanted)


def test_the_tokenizer_of_a_remote_data_set_is_fetched(folder, web, cache, tokenizer):
    path, kept = folder / "tokenizer.json", (folder / "dataset.json").read_text()
    try:
        tokenizer.save(path)
        own = {"tokenizer": hashlib.sha256(path.read_bytes()).hexdigest()}
        (folder / "dataset.json").write_text(json.dumps(json.loads(kept) | own))
        content = path.read_bytes()
        path.write_bytes(content[:-1])  # during the copy: a damaged one is not kept
        dataset = open_dataset(web, "train")
        with pytest.raises(DataError, match=r"wanted the tokenizer that dataset\.json names, found another"):
            tokenizer_for(dataset, 300)
        path.write_bytes(content)
        for _ in range(2):
            assert tokenizer_for(dataset, 300).fingerprint == tokenizer.fingerprint
        assert Quiet.asked.count("/tokenizer.json") == 2
    finally:
        path.unlink()
        (folder / "dataset.json").write_text(kept)


def test_remote_shards_outside_the_folder_are_refused(folder, web, cache):
    path = folder / "dataset.json"
    kept = path.read_text()
    description = json.loads(kept)
    description["splits"]["train"]["shards"][0]["tar"] = "../../stolen.tar"
    path.write_text(json.dumps(description))
    try:
        with pytest.raises(DataError, match=r"wanted shards inside the folder, found '\.\./\.\./stolen\.tar'"):
            open_dataset(web, "train")
    finally:
        path.write_text(kept)


def test_a_shard_held_by_one_process_is_not_removed_by_another(folder, web, cache, monkeypatch):
    """Two jobs share a cache with room for two shards."""
    size = limit_to(monkeypatch, folder, 2.2)
    shards = json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"]
    one, two = RemoteCache(web, cache, size), RemoteCache(web, cache, size)
    for cached in (one, two):
        cached.register_shards(shards)
    one.fetch([0])
    two.fetch([1])
    with pytest.raises(DataError, match="wanted room"):
        two.fetch([2])
    asked = len(Quiet.asked)
    two.fetch([0])  # cached already
    assert len(Quiet.asked) == asked
    one.release_except([])
    with pytest.raises(DataError, match="wanted room"):  # the other still holds it
        one.fetch([3])
    two.release_except([0])
    one.fetch([3])  # in place of 1, which nobody holds
    left = sorted(path.name for path in cache.glob("*/*.tar"))
    assert left == [shards[0]["tar"], shards[3]["tar"]]
    one.release_except([])
    two.release_except([])


def test_reading_captions_does_not_hold_shards(folder, web, cache, monkeypatch):
    """Training a tokenizer on all captions works with room for two shards, and fetched shards stay held."""
    size = limit_to(monkeypatch, folder, 2.2)
    dataset = open_dataset(web, "train")
    assert tokenizer_for(dataset, 300).fingerprint == tokenizer_for(open_dataset(folder, "train"), 300).fingerprint
    assert dataset.remote is not None
    dataset.remote.fetch([0])
    assert dataset.captions(0) == open_dataset(folder, "train").captions(0)
    other = RemoteCache(web, cache, size)
    other.register_shards(json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"])
    other.fetch([1])
    with pytest.raises(DataError, match="wanted room"):
        other.fetch([2])
    dataset.remote.release_except([])
    other.fetch([2])
    other.release_except([])


def test_a_shard_being_fetched_counts_in_the_cache_size(folder, web, cache, monkeypatch):
    """One job is fetching a shard when another makes room for its own. Both would exceed the limit."""
    size = limit_to(monkeypatch, folder, 1.5)
    shards = json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"]
    one, two = RemoteCache(web, cache, size), RemoteCache(web, cache, size)
    for cached in (one, two):
        cached.register_shards(shards)
    begun, go_on = threading.Event(), threading.Event()
    get_file = one.filesystem.get_file

    def slowly(path: str, to: str) -> None:
        with open(to, "wb"):  # as fsspec does
            begun.set()
        assert go_on.wait(60)
        get_file(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(one, "filesystem", SimpleNamespace(get_file=slowly))
        thread = threading.Thread(target=one.fetch, args=([0],))
        thread.start()
        assert begun.wait(60)
        try:
            with pytest.raises(DataError, match="wanted room"):
                two.fetch([1])
        finally:
            go_on.set()
            thread.join()
    assert [path.name for path in cache.glob("*/*.tar*") if path.suffix != ".lock"] == [shards[0]["tar"]]
    one.release_except([])
    two.fetch([1])
    two.release_except([])


def test_a_cached_file_may_vanish_while_room_is_made(folder, web, cache, monkeypatch):
    """It vanishes between the listing and the stat, as when another job removes it."""
    size = limit_to(monkeypatch, folder, 1.5)
    cached = RemoteCache(web, cache, size)
    cached.register_shards(json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"])
    listed = Path.glob
    gone = [cached.folder / "train-000009.tar", cached.folder / "train-000009.tar.part"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*listed(self, pattern), *gone])
    cached.fetch([0])
    cached.release_except([])


HAMMER = """
import hashlib, json, sys, time
from pathlib import Path
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.dataset.remote_cache import RemoteCache

url, cache, size, seed, shards = *sys.argv[1:5], json.loads(sys.argv[5])
cached = RemoteCache(url, Path(cache), int(size))
cached.register_shards(shards)
for turn in range(10):
    number = (turn * 7 + int(seed) * 3) % len(shards)
    while True:
        try:
            cached.fetch([number])
            break
        except DataError:  # the other jobs hold all the room
            cached.release_except([])
            time.sleep(0.01)
    tar = cached.folder / shards[number]["tar"]
    assert hashlib.sha256(tar.read_bytes()).hexdigest() == shards[number]["sha256"]
    cached.release_except([number])
"""


def test_jobs_can_share_a_remote_cache(folder, web, cache, monkeypatch):
    """Three processes fetch, verify and release shards concurrently, with room for three."""
    size = limit_to(monkeypatch, folder, 3.2)
    shards = json.dumps(json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"])
    command = [sys.executable, "-c", HAMMER, web, str(cache), str(size)]
    jobs = [subprocess.Popen([*command, str(seed), shards], stderr=subprocess.PIPE, text=True) for seed in range(3)]
    for job in jobs:
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
    assert used(cache) <= size


@pytest.mark.parametrize("place", ["s3://b/x", "s3:/b/x", "gs://b/x", "hf://datasets/o/n", "https://h/x", "http://h/x"])
def test_urls_are_recognised_as_remote(place):
    assert is_remote(place)
    assert not any(is_remote(local) for local in ("data", "/data/s3", "./s3:", "c:/data"))
