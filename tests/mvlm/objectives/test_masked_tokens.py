"""Masked copies of captions against lists."""

from dataclasses import replace

import torch

from mvlm.objectives.masked_tokens import masked_tokens, weight_of_masked_tokens
from support.models import micro_batch, with_complement, with_weights


def test_tokens_of_both_copies_follow_each_other():
    batch, masks = micro_batch((5, 4))
    masks = with_complement(batch, replace(masks, token_ids=torch.tensor([2, 6])))
    assert masks.complement_ids is not None
    assert masks.complement_ids.tolist() == [1, 3, 7]
    found = masked_tokens(batch, masks)
    assert found.ids.tolist() == [2, 6, 9 + 1, 9 + 3, 9 + 7]
    assert found.targets.tolist() == batch.tokens[[2, 6, 1, 3, 7]].tolist()
    assert found.weights is None


def test_padding_positions_of_both_copies_come_last_and_count_nothing():
    batch, masks = micro_batch((5, 4))
    masks = with_weights(batch, masks)
    masks = with_complement(batch, replace(masks, token_ids=torch.tensor([2, 6]), token_weights=torch.tensor([3.0, 5])))
    assert masks.complement_ids is not None
    assert masks.complement_weights is not None
    wanted = 8 + masks.complement_weights.double().sum()
    padded = replace(
        masks,
        token_ids=torch.tensor([2, 6, 15, 15]),
        token_weights=torch.tensor([3.0, 5, 0, 0]),
        complement_ids=torch.cat([masks.complement_ids, torch.tensor([15])]),
        complement_weights=torch.cat([masks.complement_weights, torch.zeros(1)]),
    )
    longer = replace(batch, tokens=torch.cat([batch.tokens, torch.zeros(7, dtype=torch.int64)]))
    found = masked_tokens(longer, padded)
    assert found.ids.tolist() == [2, 6, 10, 12, 16, 31, 31, 31]
    assert found.targets.tolist()[5:] == [-100] * 3
    assert found.weights is not None
    assert found.weights.tolist() == [3, 5, *masks.complement_weights.tolist(), 0, 0, 0]
    for given in (masks, padded):
        assert weight_of_masked_tokens(longer, given).tolist() == [wanted, 5]


def test_number_of_masked_tokens_ignores_padding_positions():
    batch, masks = micro_batch()
    filled = replace(masks, token_ids=torch.cat([masks.token_ids, torch.tensor([35, 35, 99])]))
    number = len(masks.token_ids)
    assert (
        weight_of_masked_tokens(batch, filled).tolist()
        == weight_of_masked_tokens(batch, masks).tolist()
        == [number] * 2
    )
