"""Quality of the shuffles: the count of independent samples, and what each order gives on a small split."""

from collections import Counter

import numpy as np
import pytest

from mvlm_benchmarks.data.shuffle import independent_samples, rows


def test_independent_samples_of_a_batch():
    assert independent_samples(np.arange(0, 800, 8), 8) == 100
    assert independent_samples(np.arange(8), 8) == 1
    ids = np.random.default_rng(0).integers(0, 100, 30)
    weights = [number / 30 for number in Counter(i // 7 for i in ids.tolist()).values()]
    assert independent_samples(ids, 7) == pytest.approx(1 / sum(weight**2 for weight in weights))


@pytest.mark.slow
def test_order_2_mixes_shards_better_than_order_1():
    found = {row["order"]: row["shard"] for row in rows(200, 500, 20) if row["batch"] == 512}
    assert 2 * found["order 1"] < found["order 2"] < found["full permutation"]
