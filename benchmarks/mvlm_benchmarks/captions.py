"""Lengths of captions as data sets have them."""

import numpy as np

SHORTEST_CAPTION = 6


def caption_lengths(batch: int, longest: int, mean: float, seed: int = 0) -> np.ndarray:
    """Draw caption lengths, int64 (B,): round(Gamma(shape 4, mean)) clamped to [6, longest].

    Lengths are in tokens and include [CLS] and [SEP].
    """
    drawn = np.random.default_rng(seed).gamma(4.0, mean / 4, batch)
    return np.clip(np.rint(drawn), SHORTEST_CAPTION, longest).astype(np.int64)
