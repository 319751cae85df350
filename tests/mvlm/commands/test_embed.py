"""`mvlm embed`: its files, and what is refused."""

import json

import pytest


@pytest.mark.slow
def test_a_data_set_is_embedded(run_mvlm, trained, scenes, tmp_path):
    words = ("embed", scenes, tmp_path / "out", "--checkpoint", trained, "--device", "cpu", "--splits", "test")
    outcome = run_mvlm(*words)
    assert outcome.out[-1] == f"{tmp_path / 'out'}: 8 images and 12 texts, 0 images left out"
    assert json.loads((tmp_path / "out" / "embedding.json").read_text())["checkpoint"] == str(trained)
    assert run_mvlm(*words).out == outcome.out[-1:]  # nothing is left to do
