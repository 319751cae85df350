"""The index against full products in numpy: search, filters, adding, removing, an object store."""

import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mvlm.search.index as index_module
from mvlm.errors import ConfigError, RunError
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import create_index, open_index
from mvlm.search.query import ImageReader
from mvlm_dataloading.tools.reindex import rebuild_indices
from support.models import ALONE
from support.packages import needs
from support.scenes import png, scene

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
    by_id = {row["id"]: row for row in rows}
    for query in queries(5):
        hits, wanted = index.search(query, kind, 10**12), wanted_order(rows, query)
        assert len(hits) == len(rows) == index.count(kind)
        # equal images have equal similarities, in any order
        for found in (hits, index.search(query, kind, 7)):
            np.testing.assert_allclose(
                [hit.similarity for hit in found], [s for _, s in wanted[: len(found)]], atol=1e-6
            )
            np.testing.assert_allclose(
                [hit.similarity for hit in found], [dict(wanted)[hit.id] for hit in found], atol=1e-6
            )
    for hit in hits:
        row = by_id[hit.id]
        assert (hit.split, hit.row, hit.text) == (row["split"], row["row"], row.get("text", ""))
        assert hit.metadata == json.loads(row["metadata"])


def test_filters_choose_rows_by_metadata(index, embedded):
    rows = rows_of(embedded, "images")
    (query,) = queries(1)
    for where, keep in (
        ("base = 'red'", lambda row: json.loads(row["metadata"])["base"] == "red"),
        ("split = 'test' and row >= 4", lambda row: row["split"] == "test" and row["row"] >= 4),
        ("base = 'no such colour'", lambda row: False),
    ):
        wanted = {row["id"] for row in rows if keep(row)}
        hits = index.search(query, "images", 1000, where)
        assert {hit.id for hit in hits} == wanted
        assert index.first_captions([hit._replace(id="it's nobody") for hit in hits]) == [""] * len(wanted)
    for where in ("no_such = 1", "select", "base = ", "drop table images"):
        with pytest.raises(ConfigError, match="where: wanted an SQL condition on the columns key, source") as caught:
            index.search(query, "images", 3, where)
        assert "\n" not in str(caught.value)


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
    monkeypatch.setattr(index_module, "LEAST_PROBED", 1)  # as in an index of many cells, of which few are read: 6
    for query in vectors[::200]:
        assert [hit.id for hit in index.search(query, "images", 10, "id = '1234'")] == ["1234"]  # in any cell
        assert len(index.search(query, "images", 20, "id like '12__'")) == 20  # a few in each cell
    assert len(index.search(vectors[0], "images", count)) == count  # more than the cells hold that a query reads


@pytest.mark.slow
def test_a_column_of_integers_refuses_others_and_one_of_doubles_does_not(model, pictures, tmp_path):
    """No number is null in silence."""
    others = Path(shutil.copytree(pictures, tmp_path / "others"))
    for number, path in enumerate(sorted(others.rglob("*.json"))):
        path.write_text(json.dumps({"number": number / 2}))
    for name, folder in (("whole", pictures), ("halves", others)):
        embed(model, open_collection(folder), tmp_path / name, ALONE)
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
    embed(model, open_collection(others), tmp_path / "twos", ALONE)
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
        with pytest.raises(RunError, match="s3://bucket/none: wanted an index"):
            open_index("s3://bucket/none")
    finally:
        server.stop()


def test_a_filter_that_does_not_fit_both_tables_removes_nothing(model, pictures, tmp_path):
    """Only some images have captions and metadata; the filter means the same for both tables."""
    for path in pictures.rglob("*.txt"):
        path.unlink()
    (pictures / "3.json").unlink()
    (query,) = queries(1)
    for captions in (0, 1):
        embed(model, open_collection(pictures), tmp_path / f"{captions}", ALONE, "the run")
        index = create_index(tmp_path / f"{captions}", str(tmp_path / f"index-{captions}"))
        assert (index.count("images"), index.count("texts")) == (10, captions)
        assert len(index.search(query, "images", 3)) == 3
        assert len(index.search(query, "texts", 3)) == captions
        (pictures / "3.txt").write_text("alone")
    with pytest.raises(ConfigError, match="where: wanted an SQL condition on the columns"):
        index.remove("text = 'alone'")  # a column of the texts
    assert (index.count("images"), index.count("texts")) == (10, 1)
    assert index.remove("number = 7") == {"images": 1, "texts": 0}
    assert index.remove("id = '3.png' or id like '3.png#%'") == {"images": 1, "texts": 1}


def test_places_and_embeddings_that_cannot_be_used_are_refused(index, embedded, tmp_path):
    whole = json.loads((embedded / "embedding.json").read_text())
    changed = {"other": whole | {"model": "0" * 64}, "new": whole | {"format_version": 99}, "damaged": [], "none": None}
    for name, description in changed.items():
        shutil.copytree(embedded, tmp_path / name)
        (tmp_path / name / "embedding.json").unlink()
        if description is not None:
            (tmp_path / name / "embedding.json").write_text(json.dumps(description))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    place = str(tmp_path / "place")
    for call, error, words in (
        (lambda: index.add(tmp_path / "other"), RunError, "wanted embeddings of the model"),
        (lambda: create_index(tmp_path / "new", place), RunError, "format version 2, found 99"),
        (lambda: create_index(tmp_path / "damaged", place), RunError, "embedding.json: wanted the description"),
        (lambda: create_index(tmp_path / "none", place), RunError, "wanted a folder that `mvlm embed` wrote"),
        (lambda: create_index(embedded, place, "hnsw"), ConfigError, "method: wanted auto, flat or ivf"),
        (lambda: create_index(embedded, index.location), RunError, "wanted a new place for the index"),
        (lambda: create_index(embedded, str(tmp_path / "full")), RunError, "full: wanted a new or empty folder"),
        (lambda: open_index(place), RunError, "place: wanted an index"),
        (lambda: open_index(str(tmp_path / "full")), RunError, "full: wanted an index"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    assert not Path(place).exists()
    assert index.count("images") == 48


def test_an_index_that_is_damaged_is_refused(embedded, tmp_path):
    create_index(embedded, str(tmp_path / "index"))
    shutil.copytree(tmp_path / "index", tmp_path / "no-images")
    shutil.rmtree(tmp_path / "no-images/images.lance")
    with pytest.raises(RunError, match="wanted the images of the index, could not be read"):
        open_index(str(tmp_path / "no-images")).count("images")
    good = open_index(str(tmp_path / "index")).about
    for value in ("{", "[1]", '{"format_version": 1}', json.dumps(good | {"format_version": 99}), None):
        columns = {"json": pa.array([value] * (value is not None), pa.string())}
        lancedb.connect(tmp_path / "index").create_table("about", pa.table(columns), mode="overwrite")
        with pytest.raises(RunError, match=r"wanted the description of an index|format version 2, found 99"):
            open_index(str(tmp_path / "index"))


def test_an_interrupted_index_is_made_again(embedded, tmp_path, monkeypatch):
    place = str(tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "columns_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            create_index(embedded, place)
    assert create_index(embedded, place).count("images") == 48


@pytest.fixture(scope="module")
def embeddings(model, scenes, tmp_path_factory) -> dict[str, Path]:
    """Embeddings of splits, of a folder before and after changes, and of tars that each number samples anew."""
    folder = tmp_path_factory.mktemp("embeddings")
    (folder / "tars").mkdir()
    (folder / "pictures").mkdir()
    for number in range(2):
        with tarfile.open(folder / "tars" / f"train-{number:06d}.tar", "w") as tar:
            for i in range(4):
                image, row = png(scene(4 * number + i)[0]), 4 * number + i
                for suffix, content in (("png", image), ("txt", f"row {row}\nagain {row}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                (folder / "pictures" / f"{row}.png").write_bytes(image)
                (folder / "pictures" / f"{row}.txt").write_text(f"picture {row}")
    rebuild_indices(folder / "tars")

    def made(name: str, data: Path, splits: list[str] | None = None) -> Path:
        embed(model, open_collection(data, splits), folder / name, ALONE, "the run")
        return folder / name

    found = {"one": made("one", scenes, ["test"]), "two": made("two", scenes, ["validation", "test"])}
    found |= {"before": made("before", folder / "pictures"), "numbered": made("numbered", folder / "tars")}
    (folder / "pictures" / "1.png").unlink()
    (folder / "pictures" / "3.txt").unlink()
    return found | {"after": made("after", folder / "pictures")}


REMOVALS = {
    "split = 'test' and row < 3": lambda row: row[1] == "test" and row[2] < 3,
    "id = '2.png' or id like '2.png#%'": lambda row: row[3].split("#")[0] == "2.png",
    "id = '000002' or id like '000002#%'": lambda row: row[3].split("#")[0] == "000002",
    "id = 'nobody'": lambda row: False,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_an_index_has_the_rows_that_were_added_and_not_removed(embeddings, scenes, tmp_path, monkeypatch, seed):
    """Rows by source, split, position, id and text, as a list keeps them. Two who opened it before take turns."""
    monkeypatch.setattr(index_module, "BATCH_ROWS", 4)  # the keys of a batch of the numbered tars are different
    rng, place, names = random.Random(seed), str(tmp_path / "index"), list(embeddings)
    splits = {name: json.loads((embeddings[name] / "embedding.json").read_text())["source"] for name in names}
    kept: dict[str, list[tuple]] = {"images": [], "texts": []}

    def add(name: str) -> None:
        path, own = splits[name]["path"], splits[name].get("splits", [""])
        for kind, rows in kept.items():
            rows[:] = [row for row in rows if not (row[0] == path and row[1] in own)]
            for row in rows_of(embeddings[name], kind):
                rows.append((path, row["split"], row["row"], row["id"], row.get("text", "")))

    first = names.pop(rng.randrange(len(names)))
    create_index(embeddings[first], place)
    add(first)
    handles, (query,) = [open_index(place), open_index(place)], queries(1)
    for step in range(8):
        changing, looking = handles[step % 2], handles[1 - step % 2]
        if rng.random() < 0.3:
            where = rng.choice(list(REMOVALS))
            gone = {kind: [row for row in rows if REMOVALS[where](row)] for kind, rows in kept.items()}
            assert changing.remove(where) == {kind: len(rows) for kind, rows in gone.items()}
            for kind, rows in kept.items():
                rows[:] = [row for row in rows if row not in gone[kind]]
        else:
            name = rng.choice(list(embeddings))
            changing.add(embeddings[name])
            add(name)
        paths = [source["path"] for source in open_index(place).sources]
        assert len(set(paths)) == len(paths)
        reader = ImageReader(looking)
        for kind, rows in kept.items():
            hits = looking.search(query, kind, 1000)
            assert sorted((paths[hit.source], hit.split, hit.row, hit.id, hit.text) for hit in hits) == sorted(rows)
            for hit in hits:
                if paths[hit.source].endswith("tars"):
                    assert reader.read(hit) == png(scene(hit.row)[0])
        hits = looking.search(query, "images", 1000)
        captions = {row[:3]: row[4] for row in reversed(kept["texts"]) if row[3].endswith("#0")}
        wanted = [captions.get((paths[hit.source], hit.split, hit.row), "") for hit in hits]
        assert looking.first_captions(hits) == wanted
