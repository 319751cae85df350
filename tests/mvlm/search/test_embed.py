"""Embeddings of a whole collection: the same as the model's own, the same files after any interruption."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import mvlm.search.embed as embedding
from mvlm.errors import RunError
from mvlm.evaluation.retrieval import encode_split
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm_dataloading import open_dataset
from support.folders import folder_hash
from support.models import micro_model

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


def test_only_texts_have_a_dictionary_in_their_files(embedded):
    """One of the numbers of vectors makes the files larger and their writing slow."""
    for kind, texts in (("images", 3), ("texts", 4)):
        group = pq.ParquetFile(embedded / f"{kind}.parquet").metadata.row_group(0)
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        with_dictionary = {name for name, column in columns.items() if column.has_dictionary_page}
        assert len(with_dictionary) == texts
        assert {"vector.list.element", "row"}.isdisjoint(with_dictionary)


def test_the_description_names_model_source_and_counts(model, scenes, embedded):
    found = json.loads((embedded / "embedding.json").read_text())
    assert found["model"] == model.sha256
    assert found["source"] == {"kind": "data", "path": str(scenes), "splits": SPLITS}
    assert (found["images"], found["texts"], found["rejected"], found["width"]) == (48, 72, 0, 8)
    assert (found["checkpoint"], found["device"], found["precision"]) == ("the run", "cpu", "fp32")
    assert sorted(path.name for path in embedded.iterdir()) == [
        ".lock", "embedding.json", "images.parquet", "rejected.jsonl", "texts.parquet",
    ]  # fmt: skip


def test_a_folder_of_images_is_embedded_and_bad_ones_are_listed(model, pictures, alone, tmp_path):
    (pictures / "deep" / "1.png").write_bytes(b"no image")
    found = embed(model, open_collection(pictures), tmp_path / "out", alone)
    assert (found["images"], found["texts"], found["rejected"]) == (9, 8, 1)
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    names = ["0.png", "3.png", "6.png", "9.png", *(f"deep/{i}.png" for i in (2, 4, 5, 7, 8))]
    assert [row["id"] for row in rows] == names
    assert [json.loads(row["metadata"]) for row in rows if row["id"] == "3.png"] == [{"number": 3, "colour": "yellow"}]
    vectors = torch.tensor([row["vector"] for row in rows])
    torch.testing.assert_close(vectors, model.embed_images([pictures / name for name in names]), rtol=0, atol=1e-6)
    texts = pq.read_table(tmp_path / "out" / "texts.parquet").to_pylist()
    assert [row["id"] for row in texts][:2] == ["3.png#0", "3.png#1"]
    assert texts[1]["text"] == "a square"
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected["id"] == "deep/1.png"
    assert "wanted an image, could not read it" in rejected["reason"]


def test_names_and_metadata_that_are_no_unicode(model, pictures, alone, tmp_path):
    """A name of other bytes is left out; a lone surrogate in metadata becomes "?"."""
    shutil.copy(pictures / "0.png", os.fsencode(pictures) + b"/caf\xe9.png")
    (pictures / "3.json").write_text('{"author": "a\\ud83d"}')
    found = embed(model, open_collection(pictures), tmp_path / "out", alone)
    assert (found["images"], found["rejected"]) == (10, 1)
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert [json.loads(row["metadata"]) for row in rows if row["id"] == "3.png"] == [{"author": "a?"}]
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected["id"] == os.fsdecode(b"caf\xe9.png")
    assert "wanted a file name in UTF-8, found other bytes; rename it" in rejected["reason"]


real_write = embedding.write_table


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    return {name: digest for name, (digest, _) in folder_hash(folder).items()}


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["first part", "second part", "join", "description"])
def test_interrupted_work_continues_with_the_same_files(model, pictures, alone, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(embedding, "PART", 4)
    embed(model, open_collection(pictures), tmp_path / "undisturbed", alone)
    name = {"join": "join_parts", "description": "write_json"}.get(failing, "write_table")
    spared = {"first part": 0, "second part": 3, "join": 1, "description": 1}[failing]
    real, calls = getattr(embedding, name), 0

    def failing_once(*arguments):
        nonlocal calls
        calls += 1
        if calls == spared + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(embedding, name, failing_once)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        embed(model, open_collection(pictures), out, alone)
    assert not (out / "embedding.json").exists()
    before = set((out / "parts").glob("*.parquet"))
    monkeypatch.setattr(embedding, name, real)
    written = []
    monkeypatch.setattr(embedding, "write_table", lambda path, table: (written.append(path), real_write(path, table)))
    embed(model, open_collection(pictures), out, alone)
    finished = {path for path in before if path.with_name(path.name.replace("images", "texts")) in before}
    assert not set(written) & finished
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_finished_work_is_not_done_again(model, scenes, embedded, alone, monkeypatch, tmp_path):
    out = shutil.copytree(embedded, tmp_path / "out")
    (out / "parts").mkdir()  # a kill between embedding.json and the removal of the parts
    monkeypatch.setattr(embedding, "write_table", None)
    assert embed(model, open_collection(scenes, SPLITS), out, alone)["images"] == 48
    assert contents(out) == contents(embedded)


def test_a_folder_of_something_else_is_refused(model, scenes, embedded, alone, tmp_path, tokenizer):
    before = contents(embedded)
    other = TrainedModel(micro_model(seed=1, dtype=torch.float32), tokenizer, "fp32")
    with pytest.raises(RunError, match=r"wanted this embedding or an empty folder, found another one \(model: found"):
        embed(other, open_collection(scenes, SPLITS), embedded, alone)
    with pytest.raises(RunError, match=r"found another one \(source: found"):
        embed(model, open_collection(scenes, ["test"]), embedded, alone)
    assert contents(embedded) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="full: wanted a new or empty folder, found other files"):
        embed(model, open_collection(scenes), tmp_path / "full", alone)
    (tmp_path / "machine" / "parts").mkdir(parents=True)
    (tmp_path / "machine" / "parts" / "gear.txt").write_text("mine")
    with pytest.raises(RunError, match="parts: wanted parts of an embedding, found other files"):
        embed(model, open_collection(scenes), tmp_path / "machine", alone)
    assert (tmp_path / "machine" / "parts" / "gear.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file: wanted a folder for the embeddings, found a file"):
        embed(model, open_collection(scenes), tmp_path / "file", alone)
    (tmp_path / "used").mkdir()
    with FileLock(tmp_path / "used" / ".lock"), pytest.raises(RunError, match="that no other process writes to"):
        embed(model, open_collection(scenes), tmp_path / "used", alone)
    embed(model, open_collection(scenes, ["test"]), tmp_path / "used", alone)
    with FileLock(tmp_path / "used" / ".lock", timeout=0):
        pass  # the lock is free again


def test_a_collection_without_a_readable_image_is_refused(model, alone, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match=r"wanted images to embed, found none that can be read; see .*rejected.jsonl"):
        embed(model, open_collection(tmp_path / "bad"), tmp_path / "out", alone)
    assert not (tmp_path / "out" / "embedding.json").exists()


def test_an_image_with_bad_files_beside_it_is_left_out_and_may_be_mended(model, pictures, alone, tmp_path):
    (pictures / "3.txt").write_bytes(b"caf\xe9")
    (pictures / "6.json").write_text("[1]")
    found = embed(model, open_collection(pictures), tmp_path / "out", alone)
    assert (found["images"], found["rejected"]) == (8, 2)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rejected] == ["3.png", "6.png"]
    assert "wanted UTF-8" in rejected[0]["reason"]
    assert "wanted a JSON object" in rejected[1]["reason"]


def test_a_folder_without_any_part_takes_other_work(model, pictures, alone, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(model, open_collection(pictures), tmp_path / "out", alone)
    (pictures / "3.txt").write_text("another caption")
    assert embed(model, open_collection(pictures), tmp_path / "out", alone)["images"] == 10
