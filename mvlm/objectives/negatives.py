"""Hard negatives for ITM, drawn from the contrastive logits.

Shape legend: G pairs of the batch that negatives are drawn from, Q of them in a block of rows, n pairs of this rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15

_MIX1 = 0xBF58476D1CE4E5B9

_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), elementwise on int64; products wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: int64's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seed: int, step: int | Tensor, stream: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise float32 (R, C) for the pairs of rows int64 (R,) and columns int64 (C,).

    A pure function of its arguments (a counter hash, no generator state), so that a pair's noise does not depend on
    how the batch lies across devices. `step` as an int64 scalar on the device gives what the number gives: a CUDA graph
    and a compiled step need it so.
    """
    # Filled on the device: a number copied there would be waited for.
    key = torch.full((), _signed(seed * _GOLDEN + stream * _MIX2), dtype=torch.int64, device=rows.device)
    key = key + (step * _signed(_MIX1) if isinstance(step, Tensor) else _signed(step * _MIX1))
    by_row = _mix(_mix(key) + rows * _signed(_GOLDEN))[:, None]  # (R, 1)
    bits = _mix(by_row + columns * _signed(_GOLDEN))  # (R, C)
    uniform = (_shift(bits, 41).float() + 0.5) / (1 << 23)  # 23 bits and a half are exact in fp32: never 0 or 1
    return -torch.log(-torch.log(uniform))


class Negatives(NamedTuple):
    """A drawn caption for each image and a drawn image for each caption. A weight of 0: none was admissible."""

    texts: Tensor
    """int64 (n,), captions, as columns of the logits."""
    text_weights: Tensor
    """(n,), 1 or 0."""
    images: Tensor
    """int64 (n,), images, as columns of the transposed logits."""
    image_weights: Tensor
    """(n,), 1 or 0."""


class NegativeSampling(NamedTuple):
    """Pairs that negatives may be drawn from, and the noise that decides."""

    image_id: Tensor
    """int64 (G,)."""
    text_id: Tensor
    """int64 (G,)."""
    seed: int
    step: int | Tensor
    block: int | None = None
    """Draw within blocks of this many consecutive pairs only; None for the whole batch."""

    def admissible(self, rows: Tensor) -> Tensor:
        """bool (Q, G) for the pairs rows int64 (Q,), True where pair j may serve as a mismatch for pair i.

        False where they share the image or the caption's words: such a pair is a true match.
        """
        same = (self.image_id[rows, None] == self.image_id) | (self.text_id[rows, None] == self.text_id)
        if self.block is not None:
            columns = torch.arange(len(self.image_id), device=rows.device)
            same |= rows[:, None] // self.block != columns // self.block
        return ~same

    def draw(self, logits: Tensor, rows: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """One column a row, with probability softmax(logits) among the admissible ones (Gumbel-argmax).

        logits (Q, G) of the pairs rows int64 (Q,). Returns the columns int64 (Q,) and their weights (Q,): 1, or 0 where
        a row has no admissible column and the drawn one is meaningless. `stream` separates the draws of the two
        directions.
        """
        columns = torch.arange(logits.shape[1], device=logits.device)
        admissible = self.admissible(rows)
        scores = logits.detach() + gumbel(self.seed, self.step, stream, rows, columns)
        drawn = scores.masked_fill(~admissible, float("-inf")).argmax(dim=1)
        return drawn, admissible.any(dim=1).to(logits.dtype)

    def draw_both(self, logits: Tensor) -> Negatives:
        """Negatives in both directions from the logits (G, G), rows images, columns captions."""
        rows = torch.arange(len(logits), device=logits.device)
        return Negatives(*self.draw(logits, rows, stream=0), *self.draw(logits.T, rows, stream=1))


class MatchingPairs(NamedTuple):
    """Pairs for ITM: every row's own pair, its image with a drawn caption, a drawn image with its caption."""

    images: Tensor
    """int64 (3n,), rows of the image features."""
    texts: Tensor
    """int64 (3n,), captions."""
    labels: Tensor
    """int64 (3n,), 1 = match."""
    weights: Tensor
    """(3n,), 0 where no negative was admissible."""


def matching_pairs(negatives: Negatives) -> MatchingPairs:
    """The three pairs of each of n rows, whose negatives are given as rows of the same features."""
    own = torch.arange(len(negatives.texts), device=negatives.texts.device)
    return MatchingPairs(
        torch.cat([own, own, negatives.images]),
        torch.cat([own, negatives.texts, own]),
        torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)]),
        matching_weights(negatives),
    )


def matching_weights(negatives: Negatives) -> Tensor:
    """Weights (3n,) of the pairs of `matching_pairs`."""
    ones = torch.ones_like(negatives.text_weights)
    return torch.cat([ones, negatives.text_weights, negatives.image_weights])
