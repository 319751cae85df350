"""Scans of generated tars: all samples are linked, in as few bytes as the pages say."""

from pathlib import Path

import pytest

from mvlm_benchmarks.data.link import measure
from mvlm_dataloading import open_dataset


@pytest.mark.slow
def test_tars_of_small_samples_are_linked_whole(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    rows = measure(tmp_path, tars=2, samples=50, rounds=1)
    assert [row["captions"] for row in rows] == ["txt", "json"]
    for row in rows:
        dataset = open_dataset(tmp_path / f"{row['captions']}-1", "train")
        assert len(dataset) == row["samples"] == 100
        assert dataset.captions(99) == ["waves number 99 in three colours, with some noise"]
        assert row["index_bytes_per_sample"] <= 60
        assert 0 < row["samples_per_s"] < 1e6
