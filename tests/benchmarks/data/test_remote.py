"""Loaders of linked tars behind a slow store: two ranks are killed, and one, two and four go on."""

import importlib.util
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from mvlm_benchmarks.data.remote import measure
from support.seaweed import weed


@pytest.mark.extended
def test_killed_ranks_go_on_with_the_same_batches(tmp_path: Path) -> None:
    """On any number of ranks, with many ranges in flight. `tests/dataloading/loader/test_ring.py` counts the bytes."""
    weed()
    for package in ("boto3", "obstore", "skimage", "sklearn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    with patch.dict(os.environ):
        found = measure(tmp_path, tars=4, samples=32, steps=20, step_s=0, delay=0.02)
    assert found["killed_after"] == 10
    assert [(one["ranks"], one["equal"], one["steps"]) for one in found["ranks"]] == [
        (1, True, 10),
        (2, True, 10),
        (4, True, 10),
    ]
    assert min(one["in_flight"] for one in found["ranks"]) >= 16
