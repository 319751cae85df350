"""Intervals that say how sure a recall is."""

import numpy as np
import torch
from torch import Tensor

from mvlm.evaluation.retrieval import RECALLS_AT

RESAMPLES = 10_000


def recall_intervals(ranks: Tensor, images: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of the recalls of `recall`, in per cent: the percentile bootstrap over images.

    The captions of an image are not independent queries, so images are drawn, each with all of its queries. Images
    with equal numbers of queries and of right answers are interchangeable. A resample is therefore one draw from the
    multinomial distribution over these kinds of images, and its cost does not grow with the number of images.

    Args:
        ranks: int64 (queries,), rank of the best right answer; 0 = first.
        images: int64 (queries,), image of each query.

    Returns:
        `r1`, `r5` and `r10`, each with the lower and the upper end.
    """
    found = {}
    rng = np.random.default_rng(seed)
    number = int(images.max()) + 1
    queries = torch.bincount(images, minlength=number)
    for k in RECALLS_AT:
        right = torch.bincount(images[ranks < k], minlength=number)
        pairs = torch.stack([queries, right], dim=1)[queries > 0]
        kinds, sizes = (each.numpy() for each in torch.unique(pairs, dim=0, return_counts=True))
        draws = rng.multinomial(sizes.sum(), sizes / sizes.sum(), size=RESAMPLES)  # (resamples, kinds)
        recalls = 100 * (draws @ kinds[:, 1]) / (draws @ kinds[:, 0])
        found[f"r{k}"] = [round(float(end), 2) for end in np.percentile(recalls, (2.5, 97.5))]
    return found
