"""`mvlm search`: from shards to answers, and what is refused."""

import json

import pytest

from mvlm.runs.load import load_model
from mvlm.search.index import open_index
from support.commands import assert_refused
from support.packages import needs
from support.scenes import png, scene

pytestmark = needs("lancedb")


@pytest.fixture(scope="module")
def embedded(trained, scenes, tmp_path_factory):
    from mvlm.commands.embed import embed

    out = tmp_path_factory.mktemp("embedded") / "out"
    for _ in range(2):  # the second time nothing is left to do
        embed(scenes, out, checkpoint=trained, device="cpu", splits=("test",))
    return out


@pytest.mark.slow
def test_an_index_is_made_searched_and_kept(run_mvlm, embedded, trained, tmp_path):
    place = tmp_path / "index"
    assert run_mvlm("search", "index", embedded, place).code == 0
    page, answers = tmp_path / "page.html", tmp_path / "answers.json"
    words = ("search", "query", place, "red top", "--device", "cpu")
    outcome = run_mvlm(*words, "--rerank", 4, "--top", 3, "--html", page, "--json", answers, "--where", "row > 1")
    found = json.loads(answers.read_text())
    assert len(outcome.out) == len(found) == 3
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert min(hit["row"] for hit in found) > 1
    assert page.read_text().count("data:image/png") == 3
    (tmp_path / "a.png").write_bytes(png(scene(1)[0]))  # the first image of the split
    outcome = run_mvlm(
        "search", "query", place, "--image", tmp_path / "a.png", "--of", "texts", "--checkpoint", trained
    )
    assert len(outcome.out) == 10
    (exact,) = run_mvlm("search", "query", place, "--image", tmp_path / "a.png", "--top", 1).out
    assert "test/test000" in exact
    assert run_mvlm("search", "add", embedded, place).code == 0
    assert open_index(str(place)).count("images") == 8
    assert run_mvlm("search", "remove", place, "--where", "row < 4").code == 0
    assert open_index(str(place)).count("images") == 4


@pytest.mark.slow
def test_mistakes_are_refused(run_mvlm, embedded, trained, tmp_path, monkeypatch):
    place = tmp_path / "index"
    assert_refused(run_mvlm("search", "query", place, "red"), "index: wanted an index that `mvlm search index` made")
    assert_refused(run_mvlm("search", "index", tmp_path, place), "wanted a folder that `mvlm embed` wrote, found none")
    assert run_mvlm("search", "index", embedded, place).code == 0
    assert_refused(run_mvlm("search", "query", place), "query: wanted a text, an image or both, found neither")
    other = trained / "checkpoints/step_00000001"
    assert load_model(other).sha256 != load_model(trained).sha256
    assert_refused(run_mvlm("search", "query", place, "red", "--checkpoint", other), "wanted queries of the model")
    assert_refused(run_mvlm("search", "query", place, "red " * 30), "text 0: wanted at most 12 tokens")
    picture = tmp_path / "q.png"
    picture.write_bytes(b"an image")
    for flag in ("--html", "--json"):
        query = run_mvlm("search", "query", place, "--image", picture, flag, picture)
        assert_refused(query, f"{flag[2:]}: wanted another file than the others")
        assert_refused(run_mvlm("search", "query", place, "red", flag, tmp_path), f"{flag[2:]}: wanted a file, got the")
        assert_refused(run_mvlm("search", "query", place, "red", flag, picture), f"{flag[2:]}: wanted a new file or ")
    assert picture.read_bytes() == b"an image"
    missing = run_mvlm("search", "query", place, "--image", tmp_path / "none.png")
    assert_refused(missing, "none.png: wanted an image, found no such file")
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    outcome = run_mvlm("search", "index", embedded, tmp_path / "new")
    assert_refused(outcome, "wanted the package lancedb, which is not installed; pip install 'mvlm[search]'")
