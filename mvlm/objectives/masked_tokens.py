"""Masked copies of captions, and the tokens to predict in them.

A batch has one masked copy of each caption, or two with complementary masks: in the second, all the ordinary tokens are
masked that are not in the first. Copies are packed one after another, first all captions with the first mask.

Shape legend: B captions, T packed tokens, M masked tokens of all copies.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvlm_dataloading import Batch, Masks


class MaskedTokens(NamedTuple):
    """Masked tokens of all masked copies of a batch's captions."""

    ids: Tensor
    """int64 (M,), positions in the packed copies, ascending. Padding positions come last, past all captions."""
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


def hidden_positions(masks: Masks) -> list[Tensor]:
    """Positions int64 (M,) that are masked in each masked copy of the captions."""
    return [masks.token_ids] if masks.complement_ids is None else [masks.token_ids, masks.complement_ids]


def masked_tokens(batch: Batch, masks: Masks) -> MaskedTokens:
    """List the masked tokens of all masked copies of the captions."""
    end, first = batch.cu_seqlens[-1], masks.token_ids
    # Padding positions (see `mvlm.model.packing.pad_to_bucket`) point past the last caption and are ignored.
    targets = batch.tokens.index_select(0, first).masked_fill(first >= end, -100)
    weights, second = masks.token_weights, masks.complement_ids
    if second is None:
        return MaskedTokens(first, targets, weights)
    targets = torch.cat([targets, batch.tokens.index_select(0, second).masked_fill(second >= end, -100)])
    ids = torch.cat([first, second + end]).masked_fill(targets == -100, 2 * len(batch.tokens) - 1)
    # Padding positions of the first copy lie between the two.
    order = ids.argsort(stable=True)
    if weights is not None and masks.complement_weights is not None:
        weights = torch.cat([weights, masks.complement_weights]).index_select(0, order)
    return MaskedTokens(ids.index_select(0, order), targets.index_select(0, order), weights)


def weight_of_masked_tokens(batch: Batch, masks: Masks) -> Tensor:
    """Sum of the weights of the masked tokens of a batch, by which MLM is divided, and their number: float64 (2,).

    The two are equal if all count the same. Padding positions point past the last caption: not counted.
    """
    weights = [masks.token_weights, masks.complement_weights]
    sums = []
    for ids, weight in zip(hidden_positions(masks), weights, strict=False):
        counted = (ids < batch.cu_seqlens[-1]).double()
        sums.append(torch.stack([(counted if weight is None else weight * counted).sum(), counted.sum()]))
    return torch.stack(sums).sum(0)
