"""An index of data in which a split has a key twice: tars that each number their samples anew."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import mvlm.search.index as index_module
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import SearchIndex, create_index, open_index
from mvlm.search.query import ImageReader
from mvlm_dataloading.tools.reindex import rebuild_indices
from support.packages import needs
from support.scenes import png, scene

pytestmark = needs("lancedb")
TARS, IN_TAR = 2, 4


@pytest.fixture
def numbered(tmp_path) -> Path:
    """Two tars with the keys 000000 to 000003 each; captions say the row."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    for number in range(TARS):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as tar:
            for i in range(IN_TAR):
                row = number * IN_TAR + i
                pixels, _ = scene(row)
                for extension, content in (("png", png(pixels)), ("txt", f"row {row}\nagain {row}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rebuild_indices(folder)
    return folder


@pytest.fixture
def embeddings(model, numbered, alone, tmp_path) -> Path:
    found = embed(model, open_collection(numbered), tmp_path / "embeddings", alone, "the run")
    assert (found["images"], found["texts"]) == (TARS * IN_TAR, 2 * TARS * IN_TAR)
    return tmp_path / "embeddings"


def check(index: SearchIndex, embeddings: Path, source: int) -> None:
    """Each row is there once, with the caption and the image of its own row."""
    (image, *_) = pq.read_table(embeddings / "images.parquet")["vector"].to_pylist()
    hits = index.search(np.array(image, np.float32), "images", 1000, f"source = {source}")
    assert sorted(hit.row for hit in hits) == list(range(TARS * IN_TAR))
    assert index.first_captions(hits) == [f"row {hit.row}" for hit in hits]
    assert [ImageReader(index).read(hit) for hit in hits] == [png(scene(hit.row)[0]) for hit in hits]
    texts = index.search(np.array(image, np.float32), "texts", 1000, f"source = {source}")
    wanted = [f"{word} {row}" for word in ("row", "again") for row in range(TARS * IN_TAR)]
    assert sorted(hit.text for hit in texts) == sorted(wanted)
    assert all(hit.text.endswith(f" {hit.row}") for hit in texts)


def test_rows_with_equal_keys_are_kept_apart(embeddings, tmp_path):
    index = create_index(embeddings, str(tmp_path / "index"))
    check(index, embeddings, 0)
    assert index.add(embeddings) == {"images": 8, "texts": 16}
    check(index, embeddings, 0)
    assert index.remove("id = '000002' or id like '000002#%'") == {"images": 2, "texts": 4}
    index.add(embeddings)
    check(index, embeddings, 0)


def test_rows_with_equal_keys_are_added_also_from_different_batches(
    model, pictures, alone, embeddings, tmp_path, monkeypatch
):
    embed(model, open_collection(pictures), tmp_path / "others", alone)
    index = create_index(tmp_path / "others", str(tmp_path / "index"))
    monkeypatch.setattr(index_module, "BATCH_ROWS", IN_TAR)  # the keys of a batch are different
    index.add(embeddings)
    assert index.count("images") == 10 + 8
    check(index, embeddings, 1)


def test_an_index_of_an_earlier_version_has_its_own_captions_and_is_added_to(embeddings, tmp_path):
    """Its keys had no row."""
    index = create_index(embeddings, str(tmp_path / "index"))
    import lancedb

    tables = [lancedb.connect(tmp_path / "index").open_table(kind) for kind in ("images", "texts")]
    for table in tables:
        table.update(values_sql={"key": "concat(cast(source as string), ':', split, '/', id)"})
        assert set(table.to_arrow()["key"].to_pylist()) >= {"0:train/000001" + "#0" * (table.name == "texts")}
    tables[0].delete("key = '0:train/000003' and row > 3")  # a row that an earlier version lost
    index = open_index(str(tmp_path / "index"))
    hits = index.search(np.ones(8, np.float32) / 8**0.5, "images", 1000)
    assert len(hits) == 7
    assert index.first_captions(hits) == [f"row {hit.row}" for hit in hits]
    index.add(embeddings)
    check(index, embeddings, 0)
