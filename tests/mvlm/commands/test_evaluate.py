"""`mvlm eval retrieval`: broken data and wrong arguments."""

import pytest

from mvlm_dataloading import open_dataset
from support.commands import assert_refused
from support.folders import folder_hash
from support.scenes import BROKEN, overwrite


@pytest.mark.slow
@pytest.mark.parametrize("damage, message", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_evaluation_on_broken_data_is_refused(run_mvlm, scenes_copy, tmp_path, run_copy, damage, message):
    damage(scenes_copy, "test")
    (tmp_path / "test.json").write_text("an earlier evaluation")
    before = folder_hash(tmp_path)
    words = ("--checkpoint", run_copy, "--data", scenes_copy, "--out", tmp_path / "test.json")
    assert_refused(run_mvlm("eval", "retrieval", *words), message, str(scenes_copy))
    assert folder_hash(tmp_path) == before


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


def test_evaluation_on_a_missing_split_is_refused(run_mvlm, scenes, trained):
    words = ("--checkpoint", trained, "--data", scenes, "--split", "tset")
    assert_refused(run_mvlm("eval", "retrieval", *words), "wanted the split tset, found test, train, validation")


def test_evaluation_without_candidates_is_refused(run_mvlm, trained, scenes):
    outcome = run_mvlm("eval", "retrieval", "--checkpoint", trained, "--data", scenes, "--rerank", 0)
    assert_refused(outcome, "rerank: wanted at least 1, got 0")
