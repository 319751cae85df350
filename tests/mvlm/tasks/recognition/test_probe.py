"""The linear probe against scikit-learn, the search for its regularisation, and the draws of few-shot."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mvlm.errors import ConfigError
from mvlm.tasks.recognition.probe import COARSE, FINEST, Labelled, few_shot, fit, probe, search, shots


def clusters(each: int, seed: int, spread: float = 1.0) -> Labelled:
    """Features (4 each, 6) around the centre of each of four classes, in the order of the classes."""
    centres = np.random.default_rng(0).normal(size=(4, 6))
    y = np.arange(4).repeat(each)
    x = centres[y] + spread * np.random.default_rng(seed).normal(size=(len(y), 6))
    return Labelled(torch.from_numpy(x).float(), torch.from_numpy(y))


@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
def test_a_probe_is_scikit_learns_logistic_regression(c):
    data, other = clusters(10, 1), clusters(25, 2)
    found = fit(*data, 4, c)
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-10).fit(data.x.double().numpy(), data.y.numpy())
    np.testing.assert_allclose(found.weight.T.numpy(), theirs.coef_, atol=2e-4)
    assert found.predict(other.x).tolist() == theirs.predict(other.x.double().numpy()).tolist()


@pytest.mark.parametrize("peak", [-5.25, 0.0, 1.75, 6.0])
def test_the_search_finds_the_peak_to_an_eighth_of_a_decade(peak):
    tried = []

    def score(exponent: float) -> float:
        tried.append(exponent)
        return -abs(exponent - peak)

    assert abs(search(score) - peak) < FINEST
    assert len(tried) == len(set(tried)) <= len(COARSE) + 8
    assert search(lambda _: 1.0) == COARSE[0]  # of equal scores the strongest regularisation


def test_the_probe_takes_the_regularisation_that_is_best_on_validation_and_learns_by_heart():
    train, validation = clusters(4, 1, 0.2), clusters(3, 2, 0.2)
    made, c = probe(train, validation, 4)
    both = Labelled(torch.cat([train.x, validation.x]), torch.cat([train.y, validation.y]))
    assert torch.equal(made.predict(both.x), both.y)
    assert torch.equal(made.weight, fit(*both, 4, c).weight)


def test_shots_are_so_many_of_each_class_and_follow_from_the_seed():
    y = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1])
    first, again, other = (shots(y, 3, 2, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert y[first].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(first)) == 6
    with pytest.raises(ConfigError, match="shots: wanted 4 training images of each class, found 3 of one"):
        shots(y, 3, 4, 0)
    assert len(shots(y, 3, 4, 0, strict=False)) == 10


@pytest.mark.slow
def test_few_shots_learn_only_from_their_samples():
    """With the classes of all other training samples exchanged, the probe is the same."""
    train, validation = clusters(6, 1, 0.1), clusters(3, 2, 0.1)
    chosen = shots(train.y, 4, 2, 5)
    blank = train.x.clone()
    blank[[i for i in range(24) if i not in chosen.tolist()]] = 100.0
    one, other = (few_shot(each, validation, 4, 2, 5) for each in (train, train._replace(x=blank)))
    assert torch.equal(one.weight, other.weight)
    assert (one.predict(validation.x) == validation.y).double().mean() > 0.9
