"""Opening, order and memory of large data sets: the data sets that are built, and what is measured on them."""

import csv
import os
import zlib

import numpy as np
import pytest

from mvlm_benchmarks.data import index_scale
from mvlm_dataloading import open_dataset
from mvlm_dataloading.loader.sampler import SampleOrder


def test_both_forms_of_a_data_set_are_the_same_data(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_scale, "MAX_LINKS", 2)
    for dali in (False, True):
        index_scale.build(tmp_path / str(dali), 30_000, dali=dali)
    indexed, packed = (open_dataset(tmp_path / str(dali), "train") for dali in (False, True))
    assert indexed.index.path is not None
    assert packed.index.path is None
    assert indexed.fingerprint == packed.fingerprint
    ids = np.arange(0, 30_000, 7)
    for kind in ("image", "text", "meta", "tokens"):
        assert np.array_equal(indexed.locate(kind, ids), packed.locate(kind, ids))
    assert indexed.captions(29_999) == packed.captions(49) == ["a caption of sample 49"]
    assert [os.stat(tar).st_nlink for tar in indexed.tars] == [2, 2, 1]


@pytest.mark.slow
def test_two_ranks_are_measured_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_scale, "JUMPS", (0.5,))
    options = {"--samples": 40_000, "--ranks": 2, "--most-dali": 0, "--place": tmp_path, "--out": tmp_path / "out"}
    monkeypatch.setattr("sys.argv", ["index_scale", *(str(word) for pair in options.items() for word in pair)])
    index_scale.main()
    (path,) = (tmp_path / "out").iterdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # the data set is removed
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert [row[name] for name in ("samples", "shards", "ranks", "opened_from")] == ["40000", "4", "2", "index"]
    assert 0 < float(row["open_s"]) < float(row["first_batch_s"])
    # Two processes with torch and DALI; what they share counts once.
    assert 200 < float(row["start_mb"]) < float(row["batch_mb"]) < 2000
    ids, _ = SampleOrder(np.full(4, 10_000), 0, shuffle=True)(0, 40_000)
    assert row["order_crc"] == f"{zlib.crc32(ids.astype('<i8').tobytes()):08x}"
    changes = np.count_nonzero(np.diff(ids[: 40_000 // 256 * 256] // 10_000))
    assert float(row["run"]) == pytest.approx(40_000 // 256 * 256 / (1 + changes), abs=1e-3)
    assert 3.9 < float(row["shards_in_a_batch"]) <= 4
    assert float(row["walk_samples_per_s"]) > 1000
