"""Files of remote folders that are read and written through a network that fails."""

import fsspec.config
import pytest

from mvlm_dataloading import DataError
from mvlm_dataloading.dataset import folders, transfers
from mvlm_dataloading.dataset.folders import RemoteFolder
from support.faults.faulty_proxy import FAULTS, ON_WRITES, serve_faulty
from support.object_store import serve_gcs, serve_s3
from support.web_server import serve

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(folders, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfers, "SILENCE_S", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "some.json").write_bytes(b"[" + b"1, " * 4000 + b"1]")
    return folder


@pytest.mark.slow
def test_each_fault_of_an_answer_is_survived_three_times_and_then_told(folder):
    """A length that is wrong without an error of the protocol shows in the content alone."""
    left: list[str] = []

    def check(content: bytes) -> None:
        if content != (folder / "some.json").read_bytes():
            raise ValueError(f"{len(content)} bytes")

    with serve(folder) as web, serve_faulty(web, lambda *_: left.pop() if left else None) as (url, happened):
        for fault in FAULTS:
            remote = RemoteFolder(url)
            left[:] = [fault] * 3
            assert remote.read("some.json", LIMIT, check) == (folder / "some.json").read_bytes()
            assert happened[fault] == 3 or fault == "delay"
            if fault != "delay":
                left[:] = [fault] * 8  # aiohttp itself asks once more after a closed connection
                with pytest.raises(DataError, match=rf"{url}/some\.json: .* 4 attempts failed: .+; check the URL"):
                    remote.read("some.json", LIMIT, check)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server's and the client's packages
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_writing_is_repeated_and_its_length_is_compared(folder, tmp_path, monkeypatch):
    left: list[str] = []

    def choose(method: str, path: str) -> str | None:
        return left.pop() if left and method in ("PUT", "POST", "DELETE") else None

    path = folder / "some.json"
    with serve_s3("files") as store, serve_faulty(store, choose) as (address, happened):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        remote = RemoteFolder("s3://files/deep/")
        for fault in ON_WRITES:
            left[:] = [fault] * 3
            remote.put(path, f"{fault}.json")
            remote.write(f"{fault}.txt", b"text")
            remote.get(f"{fault}.json", tmp_path / fault, LIMIT)
            assert (tmp_path / fault).read_bytes() == path.read_bytes()
        assert happened == {"error": 3, "delay": 2, "silence": 3, "closed": 3}
        assert sorted(remote.names("")) == sorted(f"{fault}.{kind}" for fault in ON_WRITES for kind in ("json", "txt"))
        copied = RemoteFolder("s3://files/copies")
        remote.copy_to("error.json", copied, "new.json")
        assert copied.read("new.json", LIMIT) == path.read_bytes()
        assert copied.has("new.json")
        assert not copied.has("old.json")
        copied.remove()
        assert copied.names("") == []
        assert len(remote.names("")) == 2 * len(ON_WRITES)
        whole = remote.filesystem.put_file

        def half(local: str, place: str) -> None:
            (tmp_path / "half").write_bytes(path.read_bytes()[:99])
            whole(str(tmp_path / "half"), place)

        monkeypatch.setattr(remote.filesystem, "put_file", half)
        with pytest.raises(DataError, match=r"deep/new: .* 4 attempts failed: 12003 bytes on this side and 99 at"):
            remote.put(path, "new")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_length_is_compared_with_that_of_the_store(folder, tmp_path, monkeypatch):
    """Google's client takes half a file for the whole, if the answer has the length of the half."""
    left: list[str] = []

    def choose(method: str, path: str) -> str | None:
        return left.pop() if left and path.startswith("/download/") else None

    path = folder / "some.json"
    with serve_gcs("files") as store, serve_faulty(store, choose) as (address, happened):
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": address, "token": "anon"})
        remote = RemoteFolder("gs://files/deep")
        remote.put(path, "some.json")
        left[:] = ["length"] * 3
        assert remote.read("some.json", LIMIT, exact=True) == path.read_bytes()
        left[:] = ["length"] * 3
        remote.get("some.json", tmp_path / "copy", LIMIT, exact=True)
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
        assert happened == {"length": 6}
        left[:] = ["length"] * 4
        with pytest.raises(DataError, match=r"some\.json: .* 4 attempts failed: 6001 bytes on this side and 12003 at"):
            remote.read("some.json", LIMIT, exact=True)


def test_attempts_that_fail_alike_are_told_once(monkeypatch, caplog):
    """As without a network."""
    monkeypatch.setattr(folders, "FIRST_PAUSE_S", 0)
    reasons = iter(["no host", "no host", "no route", "no route"])

    def fail(_: str) -> None:
        raise OSError(next(reasons))

    with pytest.raises(DataError, match="4 attempts failed: no route"):
        RemoteFolder("https://host/data").attempt("some.json", fail)
    assert [record.getMessage().rsplit(": ")[-1] for record in caplog.records] == ["no host", "no route"]
