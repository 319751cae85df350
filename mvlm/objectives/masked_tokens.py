"""Masked tokens of a batch's captions: their positions, targets and weights.

Shape legend: B captions, M masked tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvlm_dataloading import Batch, Masks


class MaskedTokens(NamedTuple):
    """Masked tokens of a batch's captions."""

    ids: Tensor
    """int64 (M,), positions in the packed captions, ascending. Padding positions come last, past all captions."""
    targets: Tensor
    """int64 (M,), true tokens; -100 for a padding position."""
    weights: Tensor | None
    """float32 (M,), weight of each in MLM, 0 for a padding position; None: all count the same."""

    def with_shares(self) -> "MaskedTokens":
        """The same with weights float64 (M,) that add up to 1, if there are any."""
        if self.weights is None:
            return self
        weights = self.weights.double().masked_fill(self.targets == -100, 0)
        return self._replace(weights=weights / weights.sum())


def masked_tokens(batch: Batch, masks: Masks) -> MaskedTokens:
    """List the masked tokens of the captions."""
    ids = masks.token_ids
    # Padding positions (see `mvlm.model.packing.pad_to_bucket`) point past the last caption and are ignored.
    targets = batch.tokens.index_select(0, ids).masked_fill(ids >= batch.cu_seqlens[-1], -100)
    return MaskedTokens(ids, targets, masks.token_weights)


def weight_of_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Sum of the weights of the masked tokens of a batch, by which MLM is divided, and their number: float64 (2,).

    The two are equal if all count the same. Padding positions point past the last caption: not counted.
    """
    counted = (masks.token_ids < batch.cu_seqlens[-1]).double()
    weights = counted if masks.token_weights is None else masks.token_weights * counted
    return torch.stack([weights.sum(), counted.sum()])
