"""Remote data through local servers, from opening to batches: object stores, the hub and a web server."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mvlm_dataloading import DataError, Loader, open_dataset
from mvlm_dataloading.dataset.folders import RemoteFolder
from mvlm_dataloading.loader import reader, sampler
from support.commands import MICRO_FLAGS
from support.data import limit_cache, tree_bytes
from support.hub import COMMIT, serve_data, serve_hub
from support.linked import write_table, write_tars
from support.object_store import serve_gcs, serve_s3
from support.web_server import FolderHandler, serve


def open_loader(dataset, tokenizer, **settings) -> Loader:
    return Loader(dataset, tokenizer, batch_size=8, image_size=32, text_length=12, seed=4, **settings)


def batches(dataset, tokenizer, count: int):
    loader = open_loader(dataset, tokenizer)
    found = list(itertools.islice(loader, count))
    loader.close()
    return found


def assert_equal(found, wanted) -> None:
    assert len(found) == len(wanted)
    for (a, _), (b, _) in zip(found, wanted, strict=True):
        assert a.sample_id.tolist() == b.sample_id.tolist()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


def assert_served(place: str, served, data_cache, tokenizer) -> None:
    """Several epochs from `place` are those of the local folder, and a missing folder gives an error with its URL."""
    dataset = open_dataset(place, "train")
    assert not list(data_cache.glob("*/*.tar"))  # before they are needed
    assert_equal(batches(dataset, tokenizer, 15), batches(open_dataset(served, "train"), tokenizer, 15))
    assert len(list(data_cache.glob("*/*.tar"))) == len(dataset.tars)
    with pytest.raises(DataError, match=rf"{place}/none/dataset.json: wanted a file that the data set needs"):
        open_dataset(f"{place}/none", "train")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the servers' and the clients' packages
@pytest.mark.parametrize("place, serve_store", [("s3://pairs/deep", serve_s3), ("gs://pairs/deep", serve_gcs)])
def test_object_stores_serve_a_data_set(served, data_cache, waves_tokenizer, place, serve_store):
    with serve_store("pairs"):
        for path in served.iterdir():
            RemoteFolder(place).put(path, path.name)
        assert_served(place, served, data_cache, waves_tokenizer)


@pytest.mark.slow
def test_the_hugging_face_hub_serves_a_data_set(served, data_cache, waves_tokenizer):
    with serve_hub(served, "owner/pairs") as asked:
        assert_served("hf://datasets/owner/pairs", served, data_cache, waves_tokenizer)
        assert any("resolve" in path for path in asked)


@pytest.mark.extended
def test_a_private_data_set_of_the_hub_is_linked_and_trained_on(tmp_path):
    """By commands, with a token in the environment, which no file and no line has; and what is said without it."""
    for name in ("test-0.parquet", "train-0.parquet"):
        write_table(tmp_path / "hub" / "data" / name, range(40), by_datasets=True)
    write_tars(tmp_path / "hub" / "train", 1, 24)
    (tmp_path / "hub" / "README.md").write_text("about them")
    token, out, lines = "hf_secretsecretsecret", tmp_path / "out", []

    def mvlm(address: str, token: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(out / "home")}
        environment |= {"MVLM_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mvlm", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    with serve_data(tmp_path / "hub", "them/theirs", token) as (address, _):
        link = ("data", "link", "hf://datasets/them/theirs", str(out / "data"), "--caption", "caption,txt")
        train = ("pretrain", "tiny", "--data", str(out / "data"), "--out", str(out / "run"), *MICRO_FLAGS)
        for words in (link, train):
            done = mvlm(address, token, *words)
            assert done.returncode == 0, done.stderr
            lines += [done.stdout, done.stderr]
        urls = {
            split: [shard["tar"] for shard in part["shards"]]
            for split, part in json.loads((out / "data" / "dataset.json").read_text())["splits"].items()
        }
        place = f"hf://datasets/them/theirs@{COMMIT}"
        assert urls == {
            "test": [f"{place}/data/test-0.parquet"],
            "train": [f"{place}/data/train-0.parquet", f"{place}/train/00000.tar"],
        }
        refused = mvlm(address, "hf_anotherother", *link[:3], str(out / "other"))
        assert refused.returncode == 2
        assert "denied (status 401)" in refused.stderr
        missing = mvlm(address, token, "data", "link", "hf://datasets/them/theirs/none.tar", str(out / "other"))
        assert missing.returncode == 2
        assert "status 404" in missing.stderr
        for one in (refused, missing):
            assert one.stderr.count("\n") == 1
            lines += [one.stdout, one.stderr]
    assert not any("hf_" in line for line in lines)
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(token.encode() in path.read_bytes() for path in written)


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(sampler, "GROUP", 1)
    monkeypatch.setattr(reader, "FIRST_SEGMENT_BATCHES", 1)
    monkeypatch.setattr(reader, "MAX_SEGMENT_SAMPLES", 8)


@pytest.mark.extended
@pytest.mark.slow
def test_several_epochs_from_a_web_server_through_a_small_cache(
    served, web, data_cache, waves_tokenizer, monkeypatch, small_segments
):
    size = limit_cache(monkeypatch, served, 4.5)
    dataset = open_dataset(web, "train")
    wanted = batches(open_dataset(served, "train"), waves_tokenizer, 24)
    found = []
    loader = open_loader(dataset, waves_tokenizer)
    for batch in itertools.islice(loader, 24):  # four epochs
        found.append(batch)
        assert tree_bytes(data_cache) <= size
    loader.close()
    assert_equal(found, wanted)
    tars = [path for path in FolderHandler.asked if path.endswith(".tar")]
    assert set(tars) == {f"/{tar.name}" for tar in dataset.tars}
    assert len(tars) > len(dataset.tars)  # some were removed and came again
    assert not list(data_cache.glob("*/*.part"))


def test_a_remote_cache_that_is_too_small_is_refused(served, web, data_cache, waves_tokenizer, monkeypatch):
    limit_cache(monkeypatch, served, 1.5)
    with pytest.raises(DataError, match=r"wanted room for \d+ bytes more.*; raise MVLM_CACHE_GB"):
        batches(open_dataset(web, "train"), waves_tokenizer, 1)
    for size in ("much", "inf", "1e300", "nan", "-1", "0"):
        monkeypatch.setenv("MVLM_CACHE_GB", size)
        with pytest.raises(DataError, match=f"MVLM_CACHE_GB: wanted a number of gigabytes above 0, got '{size}'"):
            open_dataset(web, "train")


def test_a_remote_shard_with_other_bytes_is_refused(served, web, data_cache, waves_tokenizer):
    tar = sorted(served.glob("*.tar"))[2]
    content = tar.read_bytes()
    try:
        tar.write_bytes(content[:-1] + b"x")
        with pytest.raises(
            DataError, match=rf"{tar.name}: wanted to read or write it, found that 4 attempts failed: sha256 .* where"
        ):
            batches(open_dataset(web, "train"), waves_tokenizer, 6)
        assert not [
            path for path in data_cache.glob("*/*") if path.name.startswith(tar.name) and path.suffix != ".lock"
        ]
    finally:
        tar.write_bytes(content)
        for index in (tar.with_suffix(".idx"), served / "train.index"):
            os.utime(index)


@pytest.mark.slow
def test_a_damaged_cached_index_is_fetched_again(served, web, data_cache, waves_tokenizer):
    open_dataset(web, "train")
    (path,) = data_cache.glob("*/train.index")
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[:50] + b"xxxx" + content[54:]):
        path.write_bytes(damaged)
        found = batches(open_dataset(web, "train"), waves_tokenizer, 6)
        assert_equal(found, batches(open_dataset(served, "train"), waves_tokenizer, 6))
        assert path.read_bytes() == content


def test_folders_of_earlier_versions_open_from_dali_indices(served, data_cache, waves_tokenizer, tmp_path):
    """A damaged one in the cache is fetched again."""
    shutil.copytree(served, tmp_path / "old", ignore=shutil.ignore_patterns("*.index"))
    with serve(tmp_path / "old") as web:
        open_dataset(web, "train")
        first, *_, last = sorted(data_cache.glob("*/*.idx"))
        first.write_bytes(b"")
        last.write_bytes(last.read_bytes().replace(b"jpg", b"gif"))
        found = batches(open_dataset(web, "train"), waves_tokenizer, 6)
    assert_equal(found, batches(open_dataset(served, "train"), waves_tokenizer, 6))
