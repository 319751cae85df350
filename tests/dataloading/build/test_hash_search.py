"""The search for near-duplicate hashes against a loop over all pairs."""

import numpy as np

from mvlm_dataloading.build.hash_search import MAX_DISTANCE, first_equal, near_known, near_pairs


def test_near_pairs_match_a_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 120, np.uint64)
    for i in range(0, 100, 2):  # neighbours at all distances from 0 to 6, and a few copies
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        values[i + 1] = values[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    found = sorted(near_pairs(values, np.ones(120), 1.1))
    assert len(set(found)) == len(found)
    wanted = [
        (i, j) for i in range(120) for j in range(i + 1, 120)
        if int(values[i] ^ values[j]).bit_count() <= MAX_DISTANCE
    ]  # fmt: skip
    assert found == wanted
    assert len(wanted) > 15
    # Each of the four bands in turn is the only one that is the same.
    for same in range(4):
        flips = sum(1 << (16 * band + 5) for band in range(4) if band != same)
        pair = np.array([values[0], values[0] ^ np.uint64(flips)])
        assert list(near_pairs(pair, np.ones(2), 1.1)) == [(0, 1)]
        assert list(near_pairs(pair, np.array([1.0, 1.2]), 1.1)) == []
        assert near_known(pair[:1], np.ones(1), pair[1:], np.ones(1), 1.1).tolist() == [0]
    # Equal hashes: each image with the first of its shape, also if one of another shape comes before both.
    equal, shapes = np.zeros(6, np.uint64), np.array([1.0, 1.5, 1.0, 1.6, 3.0, 1.5])
    assert sorted(near_pairs(equal, shapes, 1.1)) == [(0, 2), (1, 3), (1, 5)]
    ones = np.ones(120)
    first = near_known(values[60:], ones[60:], values[:60], ones[:60], 1.1)
    for i, j in enumerate(first.tolist()):
        near = [k for k in range(60) if int(values[60 + i] ^ values[k]).bit_count() <= MAX_DISTANCE]
        assert j == (near[0] if near else -1)
    assert (near_known(values, ones, values, 2 * ones, 1.1) == -1).all()
    assert first_equal(np.array([b"b", b"a", b"b", b"c", b"a"], "S32")).tolist() == [0, 1, 0, 3, 1]
