"""Examples run with the plugin alone: `pytest -p proof_kit.plugin --proof sm_90 tests/proof_kit/examples`."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("proof", None) else True
