"""Embeddings of a whole collection: the same as the model's own, the same files after any interruption."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import mvlm.device
import mvlm.search.embed as embedding
from mvlm.errors import RunError
from mvlm.evaluation.retrieval import encode_split
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm_dataloading import open_dataset
from support.folders import folder_hash
from support.models import ALONE, micro_model

SPLITS = ["train", "validation", "test"]


@pytest.mark.slow
def test_vectors_are_those_of_evaluation_to_the_digit(model, scenes, embedded):
    images, texts = (pq.read_table(embedded / f"{kind}.parquet") for kind in ("images", "texts"))
    assert str(images.schema.field("vector").type) == "fixed_size_list<element: float>[8]"
    for split in SPLITS:
        dataset = open_dataset(scenes, split)
        wanted = encode_split(model.network, dataset, model.tokenizer, "fp32")
        rows = [row for row in images.to_pylist() if row["split"] == split]
        assert [row["id"] for row in rows] == dataset.keys.tolist()
        assert [row["row"] for row in rows] == list(range(len(dataset)))
        assert [json.loads(row["metadata"]) for row in rows] == [dataset.metadata(i) for i in range(len(dataset))]
        assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), wanted.image_embedding.numpy())
        words = [row for row in texts.to_pylist() if row["split"] == split]
        assert [row["text"] for row in words] == wanted.captions
        assert [row["row"] for row in words] == wanted.owner.tolist()
        assert [row["id"].split("#")[0] for row in words] == [dataset.keys[i] for i in wanted.owner.tolist()]
        if split == "train":  # the first, so its captions are batched as in evaluation
            vectors = np.array([row["vector"] for row in words], np.float32)
            assert np.array_equal(vectors, wanted.text_embedding.numpy())


def test_the_description_names_model_source_and_counts(model, scenes, embedded):
    found = json.loads((embedded / "embedding.json").read_text())
    assert found["model"] == model.sha256
    assert found["source"] == {"kind": "data", "path": str(scenes), "splits": SPLITS}
    assert (found["images"], found["texts"], found["rejected"], found["width"]) == (48, 72, 0, 8)
    assert (found["checkpoint"], found["device"], found["precision"]) == ("the run", "cpu", "fp32")
    assert sorted(path.name for path in embedded.iterdir()) == [
        ".lock", "embedding.json", "images.parquet", "rejected.jsonl", "texts.parquet",
    ]  # fmt: skip


def test_a_folder_of_images_is_embedded(model, pictures, tmp_path):
    found = embed(model, open_collection(pictures), tmp_path / "out", ALONE)
    assert (found["images"], found["texts"], found["rejected"]) == (10, 10, 0)
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    names = ["0.png", "3.png", "6.png", "9.png", *(f"deep/{i}.png" for i in (1, 2, 4, 5, 7, 8))]
    assert [row["id"] for row in rows] == names
    assert [json.loads(row["metadata"]) for row in rows if row["id"] == "3.png"] == [{"number": 3, "colour": "yellow"}]
    vectors = torch.tensor([row["vector"] for row in rows])
    torch.testing.assert_close(vectors, model.embed_images([pictures / name for name in names]), rtol=0, atol=1e-6)
    texts = pq.read_table(tmp_path / "out" / "texts.parquet").to_pylist()
    assert [row["id"] for row in texts][:2] == ["3.png#0", "3.png#1"]
    assert texts[1]["text"] == "a square"


real_write = embedding.write_table


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    return {name: digest for name, (digest, _) in folder_hash(folder).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing, spared", [("write_table", 0), ("write_table", 3), ("join_parts", 1), ("write_json", 1)]
)
def test_interrupted_work_continues_with_the_same_files(model, pictures, tmp_path, monkeypatch, failing, spared):
    """In the first part, in the second, while parts are joined, and before the description."""
    monkeypatch.setattr(embedding, "PART", 4)
    embed(model, open_collection(pictures), tmp_path / "undisturbed", ALONE)
    out, real, written = tmp_path / "out", getattr(embedding, failing), []
    calls = iter(range(spared))

    def failing_once(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, failing, failing_once)
        with pytest.raises(KeyboardInterrupt):
            embed(model, open_collection(pictures), out, ALONE)
    assert not (out / "embedding.json").exists()
    before = set((out / "parts").glob("*.parquet"))
    monkeypatch.setattr(embedding, "write_table", lambda path, table: (written.append(path), real_write(path, table)))
    embed(model, open_collection(pictures), out, ALONE)
    finished = {path for path in before if path.with_name(path.name.replace("images", "texts")) in before}
    assert not set(written) & finished
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_finished_work_is_not_done_again(model, scenes, embedded, monkeypatch, tmp_path):
    out = shutil.copytree(embedded, tmp_path / "out")
    (out / "parts").mkdir()  # a kill between embedding.json and the removal of the parts
    monkeypatch.setattr(embedding, "write_table", None)
    assert embed(model, open_collection(scenes, SPLITS), out, ALONE)["images"] == 48
    assert contents(out) == contents(embedded)


def test_a_folder_of_something_else_is_refused(model, scenes, embedded, tmp_path, tokenizer):
    before = contents(embedded)
    other = TrainedModel(micro_model(seed=1, dtype=torch.float32), tokenizer, "fp32")
    for name in ("full/mine.txt", "machine/parts/gear.txt", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for of, splits, out, words in (
        (other, SPLITS, embedded, r"found another one \(model: found"),
        (model, ["test"], embedded, r"found another one \(source: found"),
        (model, None, tmp_path / "full", "full: wanted a new or empty folder, found mine.txt"),
        (model, None, tmp_path / "machine", "machine: wanted a new or empty folder, found gear.txt"),
        (model, None, tmp_path / "file", "file: wanted a folder for the embeddings, found a file"),
    ):
        with pytest.raises(RunError, match=words):
            embed(of, open_collection(scenes, splits), out, ALONE)
    assert contents(embedded) == before
    assert [path.read_text() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == ["mine"] * 3
    (tmp_path / "used").mkdir()
    with FileLock(tmp_path / "used" / ".lock"), pytest.raises(RunError, match="that no other process writes to"):
        embed(model, open_collection(scenes), tmp_path / "used", ALONE)
    embed(model, open_collection(scenes, ["test"]), tmp_path / "used", ALONE)
    with FileLock(tmp_path / "used" / ".lock", timeout=0):
        pass  # the lock is free again


def test_a_collection_without_a_readable_image_is_refused(model, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match=r"wanted images to embed, found none"):
        embed(model, open_collection(tmp_path / "bad"), tmp_path / "out", ALONE)
    assert not (tmp_path / "out" / "embedding.json").exists()


BAD_FILES = {  # file -> its content, and what is said of it
    "3.txt": (b"caf\xe9", "wanted UTF-8"),
    "6.json": (b"[1]", "wanted a JSON object"),
    "9.json": (b"{", "wanted a JSON object"),
    "deep/1.txt": (b"a" * (5 << 20), "wanted at most"),
    "deep/2.png": (b"no image", "wanted an image"),
    os.fsdecode(b"caf\xe9.png"): (b"", "wanted a file name in UTF-8"),
}


def test_images_that_cannot_be_used_are_left_out_and_listed(model, pictures, tmp_path):
    for name, (content, _) in BAD_FILES.items():
        (pictures / name).write_bytes(content)
    (pictures / "0.json").write_text('{"author": "a\\ud83d"}')  # half a letter becomes "?"
    found = embed(model, open_collection(pictures), tmp_path / "out", ALONE)
    assert (found["images"], found["rejected"]) == (5, 6)
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert [json.loads(row["metadata"]) for row in rows if row["id"] == "0.png"] == [{"author": "a?"}]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    said = {os.path.splitext(row["id"])[0]: row["reason"] for row in rejected}
    assert said.keys() == {os.path.splitext(name)[0] for name in BAD_FILES}
    for name, (_, words) in BAD_FILES.items():
        assert words in said[os.path.splitext(name)[0]]


@pytest.fixture
def machine(monkeypatch) -> Any:
    """A machine on which "auto" is bf16 if its `fast` is set, and fp32 if not."""
    found = SimpleNamespace(fast=True)
    monkeypatch.setattr(mvlm.device, "has_fast_bf16", lambda device: found.fast)
    monkeypatch.setattr(embedding, "PART", 4)
    return found


def automatic(model: TrainedModel, precision: str = "auto") -> TrainedModel:
    return TrainedModel(model.network, model.tokenizer, precision)


def test_work_goes_on_in_the_device_and_precision_in_which_it_began(model, machine, pictures, tmp_path, monkeypatch):
    def stop_at_the_second(path, table):
        if "0000001" in path.name:
            raise KeyboardInterrupt
        real_write(path, table)

    collection, begun = open_collection(pictures), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_table", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            embed(automatic(model), collection, begun, ALONE)
    before = folder_hash(begun)
    machine.fast = False
    with pytest.raises(RunError, match=r"precision: found bf16, wanted fp32.*give --device cpu --precision bf16"):
        embed(automatic(model), collection, begun, ALONE)
    assert folder_hash(begun) == before
    plan = begun / "parts" / "plan.json"
    whole = json.loads(plan.read_text())
    without = {name: value for name, value in whole.items() if name != "device"}  # as an earlier version wrote it
    for changed, words in (
        (whole | {"device": "cuda"}, "found cuda, wanted cpu.*give --device cuda"),
        (without | {"precision": "auto"}, r"wanted bf16\); choose another folder"),
    ):
        plan.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=words):
            embed(automatic(model, "bf16"), collection, begun, ALONE)
    plan.write_text(json.dumps(whole))
    found = embed(automatic(model, "bf16"), collection, begun, ALONE)
    assert (found["device"], found["precision"], found["images"]) == ("cpu", "bf16", 10)
    machine.fast = True
    embed(automatic(model), collection, tmp_path / "undisturbed", ALONE)
    assert {**contents(begun), "parts/plan.json": ""} == {**contents(tmp_path / "undisturbed"), "parts/plan.json": ""}
