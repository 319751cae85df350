"""`links.store`: ranges of files of a real object store, of the web, of the hub and of a disk, through bad networks."""

import os
from collections.abc import Iterator

import pytest

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links import store as module
from mvlm_dataloading.links.store import ChangedError, LinkedFile, RangeStore, SequentialFile
from support import seaweed as spoil
from support.gate import gate_of
from support.hub import COMMIT, serve_hub
from support.seaweed import KEYS, Proxy, Seaweed, reading_from, serve_proxy

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def store() -> Iterator[RangeStore]:
    found = RangeStore(8)
    yield found
    found.close()


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Failed requests are repeated at once."""
    monkeypatch.setattr("mvlm_dataloading.dataset.folders.FIRST_PAUSE_S", 0.001)


@pytest.fixture
def bucket(seaweed: Seaweed) -> Iterator[Seaweed]:
    with reading_from(seaweed.s3):
        yield seaweed


@pytest.fixture(params=["s3", "web"])
def spoiled(request, seaweed: Seaweed, at_once) -> Iterator[tuple[str, type[Proxy]]]:
    """The URL of a file of `CONTENT` behind a proxy, by S3 and on the web; and the proxy."""
    seaweed.put("content", CONTENT)
    of_s3 = request.param == "s3"
    with serve_proxy(seaweed.s3 if of_s3 else seaweed.web) as (address, proxy), reading_from(address):
        yield ("s3://tests/content" if of_s3 else f"{address}/buckets/tests/content"), proxy


def test_ranges_of_every_place(bucket: Seaweed, store, tmp_path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    remote = bucket.put("content", CONTENT)
    with serve_hub(tmp_path, "them/theirs"):
        for url in (remote, f"{bucket.web}/content", str(path), "hf://datasets/them/theirs/content"):
            file = store.stat(url)
            assert file.size == len(CONTENT)
            assert file.etag
            assert store.read(file, 1000, 70_000) == CONTENT[1000:70_000]
            assert store.read(file, len(CONTENT) - 3, len(CONTENT)) == CONTENT[-3:]
            assert len(store.read(file, 7, 7)) == 0
            futures = [store.submit(file, begin, begin + 1000) for begin in range(0, 500_000, 9999)]
            found = [future.result() for future in futures]
            assert found == [CONTENT[begin : begin + 1000] for begin in range(0, 500_000, 9999)]
            with pytest.raises(DataError, match="range"):
                store.read(file, 0, len(CONTENT) + 1)
    assert COMMIT in file.url  # another commit of the data set does not change what was linked


def test_a_file_in_order(bucket: Seaweed, store, monkeypatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 10_000)
    found = SequentialFile(store, store.stat(bucket.put("content", CONTENT)))
    assert found.read(5) == CONTENT[:5]
    found.seek(123_456)
    assert found.read(30_000) == CONTENT[123_456:153_456]
    assert found.tell() == 153_456
    found.seek(len(CONTENT) - 10)
    assert found.read(100) == CONTENT[-10:]
    assert found.read(1) == b""


@pytest.mark.parametrize("kind", ["s3", "web", "disk"])
def test_a_file_that_was_replaced(bucket: Seaweed, store, kind: str, tmp_path) -> None:
    """Also by one of the same size."""
    path = tmp_path / "content"
    url = {"s3": "s3://tests/changes", "web": f"{bucket.web}/changes", "disk": str(path)}[kind]

    def write(content: bytes) -> None:
        bucket.put("changes", content)
        path.write_bytes(content)
        os.utime(path, ns=(1, len(content) + content[0]))

    write(b"a" * 1000)
    file = store.stat(url)
    for content in (b"b" * 1000, b"a" * 500, b"a" * 2000):
        write(content)
        with pytest.raises(ChangedError, match=r"changes|content.*link it\s+again"):
            store.read(file, 0, 500)


@pytest.mark.parametrize(
    "passing",
    [spoil.dropped, spoil.truncated, spoil.another_length, spoil.endless, spoil.delayed, spoil.status(500),
     spoil.status(503), spoil.status(429)],
)  # fmt: skip
def test_what_passes_is_repeated(spoiled, store, passing) -> None:
    url, proxy = spoiled
    file = store.stat(url)
    proxy.spoils.extend([passing] * (module.ATTEMPTS - 1))
    assert store.read(file, 100, 90_000) == CONTENT[100:90_000]


@pytest.mark.parametrize(
    "error, word", [(401, "denied"), (403, "denied"), (404, "found none"), (416, "shorter"), (412, "another")]
)
def test_what_does_not_pass_ends_at_once(spoiled, store, error: int, word: str) -> None:
    url, proxy = spoiled
    file = store.stat(url)
    proxy.asked.clear()
    proxy.spoils.append(spoil.status(error))
    with pytest.raises(DataError, match=word) as caught:
        store.read(file, 0, 10)
    _is_one_line(str(caught.value), file)
    assert sum(proxy.asked.values()) == 1


def test_the_last_attempt_names_the_file(spoiled, store) -> None:
    url, proxy = spoiled
    file = store.stat(url)
    proxy.spoils.extend([spoil.status(500)] * 99)
    with pytest.raises(DataError, match="status 500") as caught:
        store.read(file, 0, 10)
    _is_one_line(str(caught.value), file)
    assert 99 - len(proxy.spoils) == module.ATTEMPTS


def test_a_server_that_ignores_if_match(spoiled, store) -> None:
    url, proxy = spoiled
    file = store.stat(url)
    proxy.spoils.append(spoil.another_file)
    with pytest.raises(ChangedError):
        store.read(file, 0, 10)


def test_redirects(spoiled, store) -> None:
    """To a file of this machine, and on the web to another host, which then is not asked."""
    url, proxy = spoiled
    file = store.stat(url)
    proxy.spoils.append(spoil.redirect("file:///etc/passwd"))
    with pytest.raises(DataError, match="redirect") as caught:
        store.read(file, 0, 10)
    _is_one_line(str(caught.value), file)
    if not url.startswith("s3"):  # the endpoint of a bucket is chosen by the user
        with serve_proxy(url) as (other, asked):
            proxy.spoils.append(spoil.redirect(other.replace("127.0.0.1", "localhost") + "/buckets/tests/content"))
            with pytest.raises(DataError, match="redirect"):
                store.read(file, 0, 10)
            assert not asked.asked


@pytest.mark.parametrize("url", ["s3://tests/content", "http://127.0.0.1:9/content"])
def test_a_store_that_is_away_has_two_minutes(store, at_once, url: str) -> None:
    """To come back, if files of it are linked; a wrong endpoint is told sooner."""
    with reading_from("http://127.0.0.1:9"):
        with pytest.raises(DataError, match=f"{module.OUTAGE_ATTEMPTS} attempts failed, the last with no connection"):
            store.read(LinkedFile(url, 100, "x"), 0, 10)
        with pytest.raises(DataError, match=f"{module.ATTEMPTS} attempts failed, the last with no connection"):
            store.stat(url)
    pauses = [0.5 * 2**k for k in range(module.OUTAGE_ATTEMPTS - 1)]
    assert 0.5 * sum(pauses) > 60  # with the least jitter


@pytest.mark.parametrize("place", ["s3", "web"])
def test_a_store_that_comes_back_costs_a_line(place: str, seaweed: Seaweed, store, monkeypatch, caplog) -> None:
    """Each range has its bytes, more attempts failed than another error has, and one line names the store."""
    monkeypatch.setattr("mvlm_dataloading.dataset.folders.FIRST_PAUSE_S", 0.02)
    seaweed.put("content", CONTENT)
    address = seaweed.s3 if place == "s3" else seaweed.web.partition("/buckets")[0]
    with gate_of(address) as gate, reading_from(gate.address):
        name = "s3://tests" if place == "s3" else gate.address
        file = store.stat("s3://tests/content" if place == "s3" else f"{name}/buckets/tests/content")
        gate.shut(refuses=8 * module.ATTEMPTS + 1)  # by eight threads
        futures = [store.submit(file, begin, begin + 100) for begin in range(0, 10_000, 625)]
        found = [future.result() for future in futures]
        gate.shut(refuses=2)
        assert store.stat(file.url) == file
    assert found == [CONTENT[begin : begin + 100] for begin in range(0, 10_000, 625)]
    assert caplog.messages == [f"{name}: the store cannot be reached; it is tried again for two minutes"]


def test_a_store_that_is_overloaded_is_tried_for_longer(spoiled, store, caplog) -> None:
    url, proxy = spoiled
    file = store.stat(url)
    proxy.spoils.extend([spoil.status(503)] * (module.OUTAGE_ATTEMPTS - 1))
    assert store.read(file, 100, 200) == CONTENT[100:200]
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "the store cannot be reached; it is tried again for two minutes"
    ]


def test_no_credential_is_in_an_error(seaweed: Seaweed, store, at_once) -> None:
    seaweed.put("content", CONTENT)
    with reading_from(seaweed.s3):
        os.environ["AWS_SECRET_ACCESS_KEY"] = "wrong-word-of-tests"
        with pytest.raises(DataError, match="denied") as caught:
            store.stat("s3://tests/content")
        assert "wrong-word" not in str(caught.value)
    with pytest.raises(DataError, match="no connection") as caught:
        store.stat("http://someone:secret-word@127.0.0.1:9/content?signature=secret-word-too")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="missing: wanted a file"):
        store.stat("missing")


def _is_one_line(message: str, file: LinkedFile) -> None:
    assert message.startswith(file.url)
    assert "\n" not in message
    assert "secret" not in message
    assert not any(secret in message for secret in KEYS.values())
