"""Galleries of the app: where the images to search come from."""

from pathlib import Path

from mvlm.app.gallery import data_of_run
from mvlm.runs.load import export


def test_a_run_knows_its_data_and_an_exported_folder_has_none(trained: Path, scenes: Path, tmp_path: Path) -> None:
    assert data_of_run(trained) == scenes
    assert data_of_run(next((trained / "checkpoints").glob("step_*"))) == scenes
    export(trained, tmp_path / "model")
    assert data_of_run(tmp_path / "model") is None
