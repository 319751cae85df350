"""Remote files whose server attacks the reader: bounds in bytes, memory, disk and time, whatever the file is.

Every kind of file is crossed with the attacks on sizes and hosts; those on time and on the protocol are the same code
for all, and are tried with one.
"""

import hashlib
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec.config
import pytest

from mvlm_dataloading import DataError, open_dataset, tokenizer_for
from mvlm_dataloading.dataset import folders, transfers
from mvlm_dataloading.dataset.folders import RemoteFolder
from mvlm_dataloading.dataset.open import write_index
from mvlm_dataloading.untrusted import LIMITS
from support.data import tree_bytes
from support.hostile_web import ATTACKS, Hostile, serve_hostile

ROOMS = ("dataset.json", "train.index", "train-000000.idx", "tokenizer.json", "train-000001.tar")
ON_SIZES = ("endless", "too_long", "bomb", "bomb_of_brotli", "away")
"""Attacks that end at once: asking again would give the same."""
IN_FLIGHT = 16 << 20
"""Bytes that a server may have sent to the system before it notices that nobody reads."""
LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch, data_cache):
    """Limits that are soon reached."""
    monkeypatch.setattr(folders, "_ATTEMPTS", 2)
    for name in ("dataset.json", "tokenizer"):
        monkeypatch.setitem(LIMITS, name, LIMIT)


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in (("SILENCE_S", 0.2), ("ANSWER_S", 0.3), ("WINDOW_S", 0.2)):
        monkeypatch.setattr(transfers, name, seconds)


@pytest.fixture(scope="module")
def folder(served, waves_tokenizer, tmp_path_factory) -> Path:
    """A data set with every kind of file. The index of the split is left out where DALI's are attacked."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    shutil.copytree(served, folder)
    waves_tokenizer.save(folder / "tokenizer.json")
    description = json.loads((folder / "dataset.json").read_text())
    description["tokenizer"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def read_all(url: str) -> None:
    dataset = open_dataset(url, "train")
    assert dataset.remote is not None
    tokenizer_for(dataset, 300)
    dataset.remote.fetch(range(len(dataset.tars)))


def refused(url: str) -> str:
    """The message of the error, which has one line."""
    with pytest.raises(DataError) as caught:
        read_all(url)
    message = str(caught.value)
    assert message.isprintable()
    return message


def missing(web: Hostile, content: bytes) -> None:
    web.head(404, {"Content-Length": "0"})


def attacks_on(room: str, name: str) -> dict[str, Callable[[Hostile, bytes], None]]:
    return {room: ATTACKS[name]} | ({"train.index": missing} if room.endswith(".idx") else {})


@pytest.mark.parametrize("room, attack", list(itertools.product(ROOMS, ON_SIZES)))
def test_no_body_is_too_long_nor_compressed_nor_from_elsewhere(folder, data_cache, room, attack):
    before = tree_bytes(folder)
    with serve_hostile(folder, attacks_on(room, attack)) as (url, web):
        message = refused(url)
    assert message.startswith(f"{url}/{room}: wanted ")
    assert web.asked[room] == 1
    assert web.asked["away"] == 0
    assert web.sent[room] < LIMIT + IN_FLIGHT
    assert not list(data_cache.glob("*/*.part"))
    assert tree_bytes(data_cache) <= before


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - set(ON_SIZES)))
def test_every_wait_ends_and_every_odd_answer_is_one_line(folder, data_cache, impatient, attack):
    with serve_hostile(folder, attacks_on("train.index", attack)) as (url, web):
        message = refused(url)
    assert re.match(rf"{url}/train\.index: wanted .*2 attempts failed", message)
    assert "secret-word" not in message
    assert web.asked["train.index"] <= 20
    assert web.asked["never"] == 0
    assert not list(data_cache.glob("*/*.part"))


def test_a_redirect_may_stay_on_its_host_or_become_https(folder, data_cache):
    def moved(web: Hostile, content: bytes) -> None:
        web.head(307, {"Content-Length": "0", "Location": "elsewhere/dataset.json"})

    def whole(web: Hostile, content: bytes) -> None:
        body = (folder / "dataset.json").read_bytes()
        web.head(200, {"Content-Length": str(len(body))})
        web.body(body)

    with serve_hostile(folder, {"dataset.json": moved, "elsewhere/dataset.json": whole}) as (url, web):
        read_all(url)
        assert web.asked["elsewhere/dataset.json"] == 1

    def upgraded(web: Hostile, content: bytes) -> None:
        web.head(302, {"Content-Length": "0", "Location": f"https://{web.headers['Host']}/dataset.json"})

    with serve_hostile(folder, {"dataset.json": upgraded}) as (url, _):
        assert "attempts failed" in refused(url)  # this server speaks no TLS


def test_names_in_the_description_that_a_cache_cannot_have_are_refused(folder):
    for name in ("dataset.json", "tokenizer.json", "train.index", "x" * 300 + ".tar", "a\x1b[2J.tar", "a\nb.tar"):
        description = json.loads((folder / "dataset.json").read_text())
        description["splits"]["train"]["shards"][0]["tar"] = name

        def edited(web: Hostile, content: bytes, text: bytes = json.dumps(description).encode()) -> None:
            web.head(200, {"Content-Length": str(len(text))})
            web.body(text)

        with serve_hostile(folder, {"dataset.json": edited}) as (url, _):
            assert "wanted tars inside the folder as shards" in refused(url)


def test_shards_may_be_in_subfolders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.index"))
    description = json.loads((folder / "dataset.json").read_text())
    (tmp_path / "data/deep").mkdir()
    for shard in description["splits"]["train"]["shards"]:
        tar = tmp_path / "data" / shard["tar"]
        tar.rename(tmp_path / "data/deep" / tar.name)
        tar.with_suffix(".idx").rename(tmp_path / "data/deep" / tar.with_suffix(".idx").name)
        shard["tar"] = f"deep/{tar.name}"
    (tmp_path / "data/dataset.json").write_text(json.dumps(description))
    write_index(tmp_path / "data", "train")
    with serve_hostile(tmp_path / "data", {}) as (url, _):
        read_all(url)


def test_a_listing_ends(folder, monkeypatch):
    def page(web: Hostile, content: bytes) -> None:
        web.head(200, {"Content-Type": "text/html"})
        for number, _ in enumerate(web.until_over()):
            web.body(b"".join(b'<a href="%d-%d">x</a>' % (number, i) for i in range(3000)))

    def tree(web: Hostile, content: bytes) -> None:
        body = b'<a href="one/">x</a><a href="two/">x</a>'
        web.head(200, {"Content-Type": "text/html", "Content-Length": str(len(body))})
        web.body(body)

    monkeypatch.setattr(folders, "PAGES_BYTES", LIMIT)
    monkeypatch.setattr(folders, "LISTING_S", 0.3)

    class Everywhere(dict):
        def __contains__(self, path: object) -> bool:
            return True

        def __missing__(self, path: str) -> Callable[[Hostile, bytes], None]:
            return tree

    for attacks, word in (({"p": page}, "megabytes"), (Everywhere(), "takes more than")):
        with serve_hostile(folder, attacks) as (url, web):
            with pytest.raises(DataError, match=word):
                RemoteFolder(url).names("p")
            assert web.sent["p"] < LIMIT + IN_FLIGHT


@pytest.mark.slow
def test_a_google_store_without_credentials_or_network_is_one_line_soon(monkeypatch):
    pytest.importorskip("gcsfs.credentials")
    import gcsfs.credentials

    monkeypatch.setattr(folders, "REACH_S", 0.1)
    waiting = threading.Event()
    google = gcsfs.credentials.GoogleCredentials
    monkeypatch.setattr(google, "_connect_google_default", lambda self: waiting.wait(20))
    monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": "http://127.0.0.1:9"})
    try:
        with pytest.raises(
            DataError, match=r"^gs://bucket/x: wanted a store that answers, found: [^\n]*refused[^\n]*$"
        ):
            RemoteFolder("gs://bucket/x")
    finally:
        waiting.set()
