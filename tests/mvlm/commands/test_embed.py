"""`mvlm embed`: its files, and what is refused."""

import json

import pytest

from support.commands import assert_refused


@pytest.mark.slow
def test_a_data_set_is_embedded(run_mvlm, trained, scenes, tmp_path):
    words = ("embed", scenes, tmp_path / "out", "--checkpoint", trained, "--device", "cpu", "--splits", "test")
    outcome = run_mvlm(*words)
    assert outcome.out[-1] == f"{tmp_path / 'out'}: 8 images and 12 texts, 0 images left out"
    assert json.loads((tmp_path / "out" / "embedding.json").read_text())["checkpoint"] == str(trained)
    assert run_mvlm(*words).out == outcome.out[-1:]  # nothing is left to do


@pytest.mark.slow
def test_mistakes_are_refused_and_nothing_is_written(run_mvlm, trained, scenes, tmp_path):
    out = tmp_path / "out"
    for data, checkpoint, message in (
        (tmp_path / "none", trained, "none: wanted a data set or a folder of images, found no such folder"),
        (scenes, tmp_path / "none", "none: wanted a run, a checkpoint or an exported folder, found no such folder"),
        (scenes, trained, "precision: wanted auto, bf16, fp32, got 'fp8'"),
    ):
        precision = "fp8" if "fp8" in message else "auto"
        outcome = run_mvlm("embed", data, out, "--checkpoint", checkpoint, "--precision", precision)
        assert_refused(outcome, message)
        assert not out.exists()
