"""`mvlm search`: from shards to answers, and what is refused."""

import json
import sys

import pytest

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


def test_other_files_are_not_overwritten_and_a_missing_package_is_named(run_mvlm, embedded, tmp_path, monkeypatch):
    place, picture = tmp_path / "index", tmp_path / "q.png"
    assert run_mvlm("search", "index", embedded, place).code == 0
    picture.write_bytes(b"an image")
    for flag in ("--html", "--json"):
        for words in (("--image", picture, flag, picture), ("red", flag, tmp_path), ("red", flag, picture)):
            assert_refused(run_mvlm("search", "query", place, *words), f"{flag[2:]}: wanted ")
    assert picture.read_bytes() == b"an image"
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert_refused(run_mvlm("search", "index", embedded, tmp_path / "new"), "lancedb", "'mvlm[search]'")
