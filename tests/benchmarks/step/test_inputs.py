"""The synthetic batch of the step benchmark."""

import numpy as np
import torch

from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.step.inputs import make_batch, pad_batch
from support.benchmarks import micro_config

MICRO = micro_config()
LENGTHS = np.array([7, 6, 12, 8, 9])


def test_caption_lengths_are_clamped_gamma_draws() -> None:
    found = caption_lengths(20_000, longest=40, mean=40 / 3)
    assert (found.min(), found.max()) == (6, 40)
    # Gamma(4) with mean 40/3 has variance mean^2 / 4; the clamp moves the mean by little.
    assert abs(found.mean() - 40 / 3) < 0.2
    assert abs(found.std() - 40 / 6) < 0.4
    assert (caption_lengths(8, 24, 8, seed=1) == caption_lengths(8, 24, 8, seed=1)).all()


def test_padded_batch_holds_the_packed_batch() -> None:
    batch, masks = make_batch(MICRO, LENGTHS)
    assert batch.cu_seqlens.tolist() == [0, 7, 13, 25, 33, 42]
    assert batch.max_length == 12
    padded = pad_batch(MICRO, batch, masks, torch.zeros(5), torch.zeros(5))
    assert padded.attention_mask.sum(1).tolist() == LENGTHS.tolist()
    assert (padded.ids[:, 0] == 0).all()
    assert (padded.ids == 1).sum() == (padded.attention_mask == 0).sum()
    hidden = padded.masked_ids == MICRO.mask_token_id
    assert (hidden == (padded.labels >= 0)).all()
    assert hidden.sum(1).tolist() == [max(1, round(0.3 * (n - 2))) for n in LENGTHS]
    assert (padded.labels[hidden] == padded.ids[hidden]).all()
    assert (padded.masked_patches.sum(1) == masks.patch_ids.shape[1]).all()
