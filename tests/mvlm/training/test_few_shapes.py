"""Batches of few shapes: when totals are rounded up, how far, and when they are not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mvlm.distributed.world import World
from mvlm.training.trainer import with_few_shapes
from support.models import ALONE, micro_batch, micro_config, pretrain_config
from support.questions import finetune_config


def configuration(**changes):
    """Configuration of a run in bf16, with captions of at most 24 tokens."""
    return pretrain_config(Path(), Path(), **({"precision": "bf16", "model": micro_config(text_length=24)} | changes))


@pytest.mark.parametrize(("changes", "most"), [({}, 1.06), ({"precision": "fp32", "capture": "compile"}, 1.12)])
def test_bf16_cpu_steps_and_compiled_ones_see_few_totals_little_padded(changes, most):
    """200 batches of 64 captions; oneDNN keeps 1,024 products, about 20 for each total."""
    rng, config = np.random.default_rng(0), configuration(**changes)
    tokens, masked, exact, padded = set(), set(), 0, 0
    for _ in range(200):
        lengths = np.clip(np.round(rng.gamma(4, 24 / 3 / 4, 64)), 6, 24).astype(int)
        batch = micro_batch(tuple(map(int, lengths)))
        [(rounded, masks)] = with_few_shapes([batch], config, ALONE)
        tokens.add(len(rounded.tokens))
        masked.add(len(masks.token_ids))
        exact, padded = exact + len(batch[0].tokens), padded + len(rounded.tokens)
    assert len(tokens) <= 8
    assert len(masked) <= 8
    assert padded < most * exact


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"precision": "fp32"}, ALONE),
        ({"plan": "plain"}, ALONE),
        ({"accumulate": 2}, ALONE),
        ({"accumulate": 2, "capture": "compile"}, ALONE),
        ({}, World(rank=0, size=2, local_rank=0, device=ALONE.device)),
        ({}, World(rank=0, size=1, local_rank=0, device=torch.device("cuda"))),
    ],
)
def test_other_steps_and_fine_tuning_get_their_batches_as_they_are(changes, world):
    loaded = [micro_batch()]
    assert with_few_shapes(loaded, configuration(**changes), world) is loaded
    tuning = finetune_config(Path(), Path(), Path(), precision="bf16")
    assert with_few_shapes(loaded, tuning, ALONE) is loaded
