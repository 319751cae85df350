"""Linear probe: logistic regression on frozen features, with its regularisation chosen on validation (as CLIP).

The objective is scikit-learn's: C times the summed cross-entropy plus half the squared norm of the weights, without the
bias. L-BFGS minimises it in float64 from zero. It is convex; with hardly any regularisation on separable classes the
minimum is far away, and L-BFGS ends at its limit of iterations, lower in the search for C than for the probe itself.

Shape legend: n samples, F features, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.errors import ConfigError

COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
"""Logarithms of C, base 10, that are tried first."""
ITERATIONS, SEARCH_ITERATIONS = 1000, 100
"""Most iterations of L-BFGS: for a probe (CLIP's number), and for each value of C that is tried."""
FINEST = 0.125
"""Smallest step of the search, in decades: eight values a decade."""


class Probe(NamedTuple):
    """A linear classifier."""

    weight: Tensor
    """float64 (F, K)."""
    bias: Tensor
    """float64 (K,)."""

    def predict(self, x: Tensor) -> Tensor:
        """Class of each row of x (n, F): int64 (n,)."""
        return (x.double() @ self.weight + self.bias).argmax(1)


def fit(x: Tensor, y: Tensor, classes: int, c: float, iterations: int = ITERATIONS) -> Probe:
    """Fit a probe to features x (n, F) and classes y int64 (n,), each 0 to K - 1.

    Args:
        c: inverse of the regularisation's strength, as in scikit-learn.
    """
    x = x.double()
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    # Divided by C n, the objective is a mean whose scale does not depend on C or n.
    penalty = 0.5 / (c * len(x))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return Probe(weight.detach(), bias.detach())


def search(score: Callable[[float], float]) -> float:
    """Find the logarithm of C, base 10, with the highest score: a coarse grid, then halved steps around the best.

    Of equal scores the strongest regularisation, the smallest C, wins.
    """
    scores = {exponent: score(exponent) for exponent in COARSE}

    def best() -> float:
        return min(scores, key=lambda exponent: (-scores[exponent], exponent))

    step = (COARSE[1] - COARSE[0]) / 2
    while step >= FINEST:
        centre = best()
        for exponent in (centre - step, centre + step):
            if exponent not in scores and COARSE[0] <= exponent <= COARSE[-1]:
                scores[exponent] = score(exponent)
        step /= 2
    return best()


class Labelled(NamedTuple):
    """Features and classes of a split."""

    x: Tensor
    """(n, F)."""
    y: Tensor
    """int64 (n,)."""

    def rows(self, chosen: Tensor) -> "Labelled":
        """Some of the samples, int64 (m,)."""
        return Labelled(self.x[chosen], self.y[chosen])


def probe(train: Labelled, validation: Labelled, classes: int) -> tuple[Probe, float]:
    """A probe of `train` and `validation`, and its C, which is the best of probes of `train` on `validation`."""

    def score(exponent: float) -> float:
        predicted = fit(*train, classes, 10**exponent, SEARCH_ITERATIONS).predict(validation.x)
        return (predicted == validation.y).double().mean().item()

    c = 10 ** search(score)
    both = Labelled(torch.cat([train.x, validation.x]), torch.cat([train.y, validation.y]))
    return fit(*both, classes, c), c


def shots(y: Tensor, classes: int, number: int, seed: int, strict: bool = True) -> Tensor:
    """Rows of `number` samples of each class of y int64 (n,), drawn from `seed`: int64 (up to K * number,).

    ConfigError if a class has fewer, unless not `strict`.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    found = []
    for row in range(classes):
        of_class = order[y[order] == row][:number]
        if strict and len(of_class) < number:
            raise ConfigError(f"shots: wanted {number} training images of each class, found {len(of_class)} of one")
        found.append(of_class)
    return torch.cat(found)


MOST_VALIDATION_SHOTS = 4


def few_shot(train: Labelled, validation: Labelled, classes: int, number: int, seed: int) -> Probe:
    """A probe of `number` training images a class. C is chosen on at most 4 validation images a class, as in CoOp."""
    few = train.rows(shots(train.y, classes, number, seed))
    some = validation.rows(shots(validation.y, classes, min(number, MOST_VALIDATION_SHOTS), seed, strict=False))

    def score(exponent: float) -> float:
        predicted = fit(*few, classes, 10**exponent, SEARCH_ITERATIONS).predict(some.x)
        return (predicted == some.y).double().mean().item()

    return fit(*few, classes, 10 ** search(score))
