"""Damaged images of linked tars: the loader finds as many as were written."""

from pathlib import Path

import pytest

from mvlm_benchmarks.data.damaged import measure


@pytest.mark.slow
def test_damaged_images_are_found_in_the_epoch(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    found = measure(tmp_path, tars=4, samples=50, every=100, rounds=1)
    assert (found["images"], found["damaged"]) == (200, 2)
