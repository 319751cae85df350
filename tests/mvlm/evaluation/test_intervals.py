"""Intervals of recalls against a bootstrap that draws images one by one, and against scipy's."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from mvlm.evaluation.retrieval import recall_intervals


@pytest.mark.slow
def test_intervals_of_captions_are_those_of_drawn_images():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    hard = rng.random(150)  # captions of one image are right or wrong together
    ranks = (rng.integers(0, 12, len(images)) * hard[images]).astype(int)
    found = recall_intervals(torch.from_numpy(ranks), torch.from_numpy(images))
    queries_of = [np.flatnonzero(images == image) for image in range(150)]
    drawn = [np.concatenate([queries_of[i] for i in rng.integers(150, size=150)]) for _ in range(4000)]
    for k in (1, 5, 10):
        expected = np.percentile([100 * np.mean(ranks[queries] < k) for queries in drawn], (2.5, 97.5))
        width = expected[1] - expected[0]
        assert np.abs(np.array(found[f"r{k}"]) - expected).max() < 0.08 * width


def test_intervals_of_single_queries_are_scipys():
    ranks = np.random.default_rng(5).integers(0, 15, 400)
    found = recall_intervals(torch.from_numpy(ranks), torch.arange(400))
    for k in (1, 5, 10):
        expected = bootstrap((100.0 * (ranks < k),), np.mean, n_resamples=9999, method="percentile", rng=1)
        ends = np.array(expected.confidence_interval)
        assert np.abs(np.array(found[f"r{k}"]) - ends).max() < 0.5, (k, found, ends)  # one query is 0.25


def test_images_without_a_query_are_not_drawn():
    ranks = torch.tensor([0, 3, 0, 20])
    assert recall_intervals(ranks, torch.tensor([7, 2, 7, 90])) == recall_intervals(ranks, torch.tensor([1, 0, 1, 2]))


def test_equal_queries_have_an_interval_of_no_width():
    assert recall_intervals(torch.zeros(9, dtype=torch.long), torch.arange(9)) == {
        "r1": [100.0, 100.0],
        "r5": [100.0, 100.0],
        "r10": [100.0, 100.0],
    }
