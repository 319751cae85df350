"""The index against full products in numpy: search, filters, adding, removing, an object store."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mvlm.search.index as index_module
from mvlm.errors import ConfigError, RunError
from mvlm.search import inverted_file
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import create_index, open_index
from mvlm.search.query import ImageReader
from support.packages import needs

pytestmark = needs("lancedb")
lancedb = pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def index(embedded, tmp_path_factory):
    return create_index(embedded, str(tmp_path_factory.mktemp("index") / "index"))


def rows_of(embedded: Path, kind: str) -> list[dict]:
    return pq.read_table(embedded / f"{kind}.parquet").to_pylist()


def wanted_order(rows: list[dict], query: np.ndarray) -> list[tuple[str, float]]:
    """Ids by cosine similarity in float64, best first; ties in stored order."""
    similarity = np.array([row["vector"] for row in rows], np.float64) @ query.astype(np.float64)
    return [(rows[i]["id"], float(similarity[i])) for i in np.argsort(-similarity, kind="stable")]


def queries(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_flat_search_is_a_full_product(index, embedded, kind):
    rows = rows_of(embedded, kind)
    for query in queries(5):
        hits = index.search(query, kind, 1000)
        wanted = wanted_order(rows, query)
        assert len(hits) == len(rows) == index.count(kind)
        np.testing.assert_allclose([hit.similarity for hit in hits], [s for _, s in wanted], atol=1e-6)
        similarity = dict(wanted)
        np.testing.assert_allclose([similarity[hit.id] for hit in hits], [s for _, s in wanted], atol=1e-6)
        # equal images have equal similarities, in any order
        first = [hit.similarity for hit in index.search(query, kind, 7)]
        np.testing.assert_allclose(first, [hit.similarity for hit in hits[:7]], atol=1e-6)
    by_id = {row["id"]: row for row in rows}
    for hit in hits:
        row = by_id[hit.id]
        assert (hit.split, hit.row, hit.text) == (row["split"], row["row"], row.get("text", ""))
        assert hit.metadata == json.loads(row["metadata"])


@pytest.mark.slow
def test_images_have_their_first_captions(index, embedded):
    wanted = {row["id"]: row["text"] for row in rows_of(embedded, "texts") if row["id"].endswith("#0")}
    hits = index.search(queries(1)[0], "images", 1000)
    assert index.first_captions(hits) == [wanted[f"{hit.id}#0"] for hit in hits]
    assert index.first_captions([hits[0]._replace(id="it's nobody")]) == [""]
    assert index.first_captions([]) == []


def test_filters_choose_rows_by_metadata(index, embedded):
    rows = rows_of(embedded, "images")
    (query,) = queries(1)
    for where, keep in (
        ("base = 'red'", lambda row: json.loads(row["metadata"])["base"] == "red"),
        ("split = 'test' and row >= 4", lambda row: row["split"] == "test" and row["row"] >= 4),
        ("base = 'no such colour'", lambda row: False),
    ):
        wanted = {row["id"] for row in rows if keep(row)}
        assert {hit.id for hit in index.search(query, "images", 1000, where)} == wanted
    for where in ("no_such = 1", "select", "base = ", "drop table images"):
        with pytest.raises(
            ConfigError, match="where: wanted an SQL condition on the columns key, source, id,"
        ) as caught:
            index.search(query, "images", 3, where)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="kind: wanted images or texts, got 'sounds'"):
        index.search(query, "sounds")
    with pytest.raises(ConfigError, match="top: wanted at least 1, got 0"):
        index.search(query, "images", 0)


@pytest.mark.slow
def test_rows_are_added_replaced_and_removed(index, model, pictures, alone, tmp_path, embedded):
    place = tmp_path / "index"
    shutil.copytree(index.location, place)
    changed = open_index(str(place))
    embed(model, open_collection(pictures), tmp_path / "more", alone)
    assert changed.add(tmp_path / "more") == {"images": 10, "texts": 10}
    assert (changed.count("images"), changed.count("texts")) == (58, 82)
    changed.add(tmp_path / "more")  # again: replaced
    changed.add(embedded)
    assert (changed.count("images"), changed.count("texts")) == (58, 82)
    again = open_index(str(place))
    assert [source["kind"] for source in again.sources] == ["data", "folder"]
    rows = [*rows_of(embedded, "images"), *rows_of(tmp_path / "more", "images")]
    (query,) = queries(1)
    np.testing.assert_allclose(
        [hit.similarity for hit in again.search(query, "images", 100)],
        [s for _, s in wanted_order(rows, query)],
        atol=1e-6,
    )
    assert [hit.source for hit in again.search(query, "images", 1, "id = '3.png'")] == [1]
    assert again.remove("split = 'train' and row < 30") == {"images": 30, "texts": 45}
    assert again.remove("id = 'nobody'") == {"images": 0, "texts": 0}
    assert {hit.row for hit in again.search(query, "images", 100, "split = 'train'")} == {30, 31}
    with pytest.raises(ConfigError, match="where: wanted an SQL condition"):
        again.remove("no_such = 1")
    assert again.count("images") == 28


def test_embeddings_of_another_model_are_refused(index, embedded, tmp_path):
    other = Path(shutil.copytree(embedded, tmp_path / "other"))
    description = json.loads((other / "embedding.json").read_text())
    (other / "embedding.json").write_text(json.dumps(description | {"model": "0" * 64}))
    with pytest.raises(RunError, match=r"wanted embeddings of the model .* of this index, found 000000000000\.\.\."):
        index.add(other)
    assert index.count("images") == 48


def test_a_query_reads_a_tenth_of_the_cells_and_at_least_40_if_there_are_so_many():
    assert [inverted_file.cells_read(cells) for cells in (0, 7, 63, 400, 1000)] == [0, 7, 40, 40, 100]


@pytest.mark.slow
def test_an_inverted_file_finds_the_nearest_and_all_that_pass_a_filter(tmp_path, embedded, monkeypatch):
    """Synthetic rows, so that an inverted file can be trained: recall at 10 of clustered vectors."""
    rng = np.random.default_rng(0)
    folder = Path(shutil.copytree(embedded, tmp_path / "synthetic"))
    table = pq.read_table(folder / "images.parquet")
    count = 4000
    centres = rng.normal(size=(40, 8))
    vectors = centres[rng.integers(40, size=count)] + 0.3 * rng.normal(size=(count, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = [{**table.slice(0, 1).to_pylist()[0], "id": str(i), "vector": vectors[i]} for i in range(count)]
    pq.write_table(type(table).from_pylist(rows, table.schema), folder / "images.parquet")
    description = json.loads((folder / "embedding.json").read_text())
    (folder / "embedding.json").write_text(json.dumps(description | {"images": count}))
    index = create_index(folder, str(tmp_path / "index"), "ivf")
    assert index.about["partitions"]["images"] == 63
    hits = 0
    for query in vectors[::200]:
        found = {hit.id for hit in index.search(query, "images", 10)}
        hits += len(found & {id for id, _ in wanted_order(rows, query)[:10]})
    assert hits >= 0.9 * 10 * len(vectors[::200])
    monkeypatch.setattr(inverted_file, "LEAST_PROBED", 1)  # as in an index of many cells, of which few are read
    assert inverted_file.cells_read(63) == 6
    for query in vectors[::200]:
        assert [hit.id for hit in index.search(query, "images", 10, "id = '1234'")] == ["1234"]  # in any cell
        assert len(index.search(query, "images", 20, "id like '12__'")) == 20  # a few in each cell
    assert len(index.search(vectors[0], "images", count)) == count  # more than the cells hold that a query reads


@pytest.mark.slow
def test_a_column_of_whole_numbers_refuses_others_and_one_of_doubles_takes_both(model, pictures, alone, tmp_path):
    """No number is null in silence."""
    others = Path(shutil.copytree(pictures, tmp_path / "others"))
    for number, path in enumerate(sorted(others.rglob("*.json"))):
        path.write_text(json.dumps({"number": number / 2}))
    for name, folder in (("whole", pictures), ("halves", others)):
        embed(model, open_collection(folder), tmp_path / name, alone)
    index = create_index(tmp_path / "whole", str(tmp_path / "index"))
    with pytest.raises(
        RunError, match=r"wanted whole numbers in the metadata's field 'number', as in .*, found others"
    ):
        index.add(tmp_path / "halves")
    assert (len(index.sources), index.count("images")) == (1, 10)
    both = create_index(tmp_path / "halves", str(tmp_path / "both"))
    both.add(tmp_path / "whole")
    (query,) = queries(1)
    found = [hit.metadata["number"] for hit in both.search(query, "images", 100, "number < 3")]
    assert sorted(found) == [0, 0.5, 1, 1, 1.5, 2]
    assert len(both.search(query, "texts", 100, "number = 0.5")) == 2
    assert len(both.search(query, "images", 100, "number = 7")) == 1
    for path in sorted(others.rglob("*.json")):
        path.write_text('{"number": 2.0}')
    embed(model, open_collection(others), tmp_path / "twos", alone)
    index.add(tmp_path / "twos")
    assert len(index.search(query, "images", 100, "number = 2")) == 5


@pytest.mark.slow
def test_an_index_lives_in_an_object_store(embedded, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (
            ("AWS_ENDPOINT_URL", address), ("AWS_ENDPOINT", address), ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        create_index(embedded, "s3://bucket/index")
        remote = open_index("s3://bucket/index")
        rows = rows_of(embedded, "images")
        (query,) = queries(1)
        found = [hit.similarity for hit in remote.search(query, "images", 3)]
        np.testing.assert_allclose(found, [s for _, s in wanted_order(rows, query)[:3]], atol=1e-9)
        assert remote.remove("split = 'test'") == {"images": 8, "texts": 12}
        assert open_index("s3://bucket/index").count("images") == 40
        with pytest.raises(
            RunError, match="s3://bucket/none: wanted an index that `mvlm search index` made, found none"
        ):
            open_index("s3://bucket/none")
    finally:
        server.stop()


def test_places_that_cannot_be_used_are_refused(index, embedded, tmp_path):
    with pytest.raises(RunError, match="none: wanted an index that `mvlm search index` made, found no such folder"):
        open_index(str(tmp_path / "none"))
    with pytest.raises(RunError, match="found none; check the path"):
        open_index(str(tmp_path))
    with pytest.raises(RunError, match="wanted a new place for the index, found an index"):
        create_index(embedded, index.location)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(RunError, match="full: wanted a new or empty folder for the index, found other files"):
        create_index(embedded, str(tmp_path / "full"))
    with pytest.raises(RunError, match="wanted a folder that `mvlm embed` wrote, found none"):
        create_index(tmp_path / "full", str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="method: wanted auto, flat or ivf, got 'hnsw'"):
        create_index(embedded, str(tmp_path / "new"), "hnsw")
    assert not (tmp_path / "new").exists()


def test_images_without_captions_are_an_index_too(model, pictures, alone, tmp_path):
    for path in pictures.rglob("*.txt"):
        path.unlink()
    embed(model, open_collection(pictures), tmp_path / "out", alone, "the run")
    found = create_index(tmp_path / "out", str(tmp_path / "index"))
    assert (found.count("images"), found.count("texts")) == (10, 0)
    assert len(found.search(queries(1)[0], "images", 3)) == 3
    assert found.search(queries(1)[0], "texts", 3) == []


def test_another_split_of_a_data_set_is_no_other_source(model, scenes, alone, tmp_path):
    for name, splits in (("one", ["test"]), ("both", ["validation", "test"])):
        embed(model, open_collection(scenes, splits), tmp_path / name, alone, "the run")
    index = create_index(tmp_path / "one", str(tmp_path / "index"))
    stale = open_index(str(tmp_path / "index"))
    reader = ImageReader(stale)
    assert reader.read(stale.search(queries(1)[0])[0])
    index.add(tmp_path / "both")
    (source,) = index.sources
    assert source["splits"] == ["test", "validation"]
    assert index.count("images") == 16
    for hit in stale.search(queries(1)[0], "images", 16):  # whoever opened it before sees the new images too
        assert reader.read(hit) == ImageReader(index).read(hit)


@pytest.mark.slow
def test_two_who_add_at_once_lose_nothing(model, scenes, pictures, alone, tmp_path, embedded):
    place = str(tmp_path / "index")
    create_index(embedded, place)
    others = [pictures, tmp_path / "more"]
    shutil.copytree(pictures, others[1])
    opened = [open_index(place) for _ in others]  # both before either adds
    for index, folder in zip(opened, others, strict=True):
        embed(model, open_collection(folder), tmp_path / f"of-{folder.name}", alone, "the run")
        index.add(tmp_path / f"of-{folder.name}")
    found = open_index(place)
    assert (len(found.sources), found.count("images")) == (3, 48 + 20)


def test_of_two_who_make_an_index_at_once_one_is_refused(embedded, tmp_path, monkeypatch):
    place, second = str(tmp_path / "index"), []

    def make(name: str = "") -> None:
        try:
            create_index(embedded, place)
        except RunError as error:
            second.append(str(error))

    thread, real = threading.Thread(target=make), index_module.write_about

    def write_about(*arguments: Any) -> None:
        if not thread.is_alive() and not second:
            thread.start()  # while the first is not finished
            thread.join(0.5)
        real(*arguments)

    monkeypatch.setattr(index_module, "write_about", write_about)
    make()
    thread.join()
    assert len(second) == 1
    assert "wanted a new place for the index, found an index" in second[0]
    assert open_index(place).count("images") == 48


def test_more_answers_than_rows_are_all_rows(index):
    assert len(index.search(queries(1)[0], "images", 10**12)) == 48


def test_a_filter_that_does_not_fit_both_tables_removes_nothing(model, pictures, alone, tmp_path):
    """Only some images have captions and metadata; the filter means the same for both tables."""
    for path in pictures.rglob("*.txt"):
        path.unlink()
    (pictures / "3.txt").write_text("alone")
    (pictures / "3.json").unlink()
    embed(model, open_collection(pictures), tmp_path / "out", alone, "the run")
    index = create_index(tmp_path / "out", str(tmp_path / "index"))
    with pytest.raises(ConfigError, match="where: wanted an SQL condition on the columns"):
        index.remove("text = 'alone'")  # a column of the texts
    assert (index.count("images"), index.count("texts")) == (10, 1)
    assert index.remove("number = 7") == {"images": 1, "texts": 0}
    assert index.remove("id = '3.png' or id like '3.png#%'") == {"images": 1, "texts": 1}


def test_an_index_that_is_damaged_is_refused(embedded, tmp_path):
    create_index(embedded, str(tmp_path / "index"))
    shutil.copytree(tmp_path / "index", tmp_path / "no-images")
    shutil.rmtree(tmp_path / "no-images/images.lance")
    with pytest.raises(RunError, match="wanted the images of the index, could not read them"):
        open_index(str(tmp_path / "no-images")).count("images")
    for rows in ({"json": []}, {"json": ["{"]}, {"json": ["[1]"]}, {"json": ['{"format_version": 1}']}, {"x": ["{}"]}):
        place = tmp_path / f"about-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "index", place)
        columns = {name: pa.array(values, pa.string()) for name, values in rows.items()}
        lancedb.connect(place).create_table("about", pa.table(columns), mode="overwrite")
        with pytest.raises(RunError, match=r"wanted the description of an index, could not read it|format version"):
            open_index(str(place))


def test_an_interrupted_index_is_made_again(embedded, tmp_path, monkeypatch):
    import mvlm.search.index as module

    place = str(tmp_path / "index")
    real = module.columns_of
    monkeypatch.setattr(module, "columns_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_index(embedded, place)
    monkeypatch.setattr(module, "columns_of", real)
    assert create_index(embedded, place).count("images") == 48


@pytest.mark.slow
def test_rows_that_a_collection_no_longer_has_are_removed(model, pictures, embedded, alone, tmp_path):
    """The rows of other collections and of other splits stay."""
    index = create_index(embedded, str(tmp_path / "index"))
    others = {kind: index.count(kind) for kind in ("images", "texts")}
    embed(model, open_collection(pictures), tmp_path / "before", alone)
    index.add(tmp_path / "before")
    (pictures / "deep" / "1.png").unlink()
    (pictures / "3.txt").unlink()
    embed(model, open_collection(pictures), tmp_path / "after", alone)
    index.add(tmp_path / "after")
    for kind in ("images", "texts"):
        rows = rows_of(tmp_path / "after", kind)
        assert index.count(kind) == others[kind] + len(rows) < others[kind] + len(rows_of(tmp_path / "before", kind))
        (query,) = queries(1)
        hits = index.search(query, kind, 1000, "source = 1")
        assert {hit.id for hit in hits} == {row["id"] for row in rows}
