"""`mvlm eval`: broken data, and what must not be overwritten."""

import json

import pytest

from mvlm_dataloading import open_dataset
from support.commands import assert_refused
from support.folders import folder_hash
from support.scenes import overwrite


def test_evaluation_on_an_undecodable_image_is_refused(run_mvlm, scenes_copy, tmp_path, trained):
    overwrite(open_dataset(scenes_copy, "test"), "image", [5])
    before = folder_hash(tmp_path)
    outcome = run_mvlm(
        "eval", "retrieval", "--checkpoint", trained, "--data", scenes_copy, "--out", tmp_path / "test.json"
    )
    assert_refused(
        outcome, "test-000000.tar offset", "test005: wanted an image, found one that cannot be decoded; remove the"
    )
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_a_file_that_is_no_result_is_not_overwritten(run_mvlm, run_copy, scenes, tmp_path, task):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "tuned.json").write_text(
        '{"checkpoint": "a start", "format_version": 3}'
    )  # a fine-tuned run's settings
    before = folder_hash(tmp_path)
    for out in (run_copy / "config.json", *(tmp_path / name for name in ("list.json", "notes.txt", "tuned.json"))):
        outcome = run_mvlm("eval", task, "--checkpoint", run_copy, "--data", scenes, "--out", out)
        assert_refused(outcome, "out: wanted a new file or the figures of an earlier evaluation", str(out))
    assert folder_hash(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"checkpoint": "earlier", "records": []}', '{\n "checkpoint": "earl'])
def test_earlier_figures_and_empty_or_cut_files_are_replaced(run_mvlm, trained, scenes, tmp_path, content):
    out = tmp_path / "out.json"
    out.write_text(content)
    words = ("--checkpoint", trained, "--data", scenes, "--out", out)
    assert run_mvlm("eval", "retrieval", *words).code == 0
    assert json.loads(out.read_text())["checkpoint"] == str(trained)
