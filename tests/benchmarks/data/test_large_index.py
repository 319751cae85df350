"""A generated index of many samples: it opens, and is as small as the pages say."""

from pathlib import Path

import pytest

from mvlm_benchmarks.data.large_index import measure, write_link


@pytest.mark.slow
def test_a_generated_index_opens_and_trains(tmp_path: Path) -> None:
    found = measure(write_link(tmp_path, 20_000))
    assert found["samples"] == 20_000
    assert found["index_bytes_per_sample"] <= 60
