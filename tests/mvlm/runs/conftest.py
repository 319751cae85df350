"""Fixtures of the tests of runs: a trained model as a folder of files."""

from pathlib import Path

import pytest

from mvlm.runs.load import load_without_head


@pytest.fixture(scope="session")
def portable(trained, tmp_path_factory) -> Path:
    """The trained model, exported. Read only."""
    out = tmp_path_factory.mktemp("portable") / "model"
    load_without_head(trained, "cpu").save(out)
    return out
