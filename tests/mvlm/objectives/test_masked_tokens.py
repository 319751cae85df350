"""Masked tokens of captions against lists."""

from dataclasses import replace

import torch

from mvlm.objectives.masked_tokens import masked_tokens, weight_of_masked_tokens
from support.models import micro_batch


def test_padding_positions_count_nothing():
    batch, masks = micro_batch((5, 4))
    masks = replace(masks, token_ids=torch.tensor([2, 6]), token_weights=torch.tensor([3.0, 5]))
    padded = replace(masks, token_ids=torch.tensor([2, 6, 15, 15]), token_weights=torch.tensor([3.0, 5, 0, 0]))
    longer = replace(batch, tokens=torch.cat([batch.tokens, torch.zeros(7, dtype=torch.int64)]))
    found = masked_tokens(longer, padded)
    assert found.ids.tolist() == [2, 6, 15, 15]
    assert found.targets.tolist() == [*batch.tokens[[2, 6]].tolist(), -100, -100]
    assert found.with_shares().weights.tolist() == [3 / 8, 5 / 8, 0, 0]
    for given in (masks, padded):
        assert weight_of_masked_tokens(longer, given).tolist() == [8, 2]


def test_number_of_masked_tokens_ignores_padding_positions():
    batch, masks = micro_batch()
    filled = replace(masks, token_ids=torch.cat([masks.token_ids, torch.tensor([35, 35, 99])]))
    number = len(masks.token_ids)
    assert (
        weight_of_masked_tokens(batch, filled).tolist()
        == weight_of_masked_tokens(batch, masks).tolist()
        == [number] * 2
    )
