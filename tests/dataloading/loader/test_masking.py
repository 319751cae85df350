import itertools
from typing import Any

import numpy as np
import pytest

from mvlm_dataloading import Masking
from mvlm_dataloading.loader.masking import (
    draw_patch_masks,
    draw_token_masks,
    draw_variable_patch_masks,
    draw_weighted_token_masks,
)


def patches_of_blocks(image_size: int, patch: int, block: int) -> dict[int, list[int]]:
    """The patches of each block, found by a loop over pixels."""
    found: dict[int, set[int]] = {}
    for y, x in itertools.product(range(0, image_size, patch), repeat=2):
        number = y // patch * (image_size // patch) + x // patch
        found.setdefault(y // block * (image_size // block) + x // block, set()).add(number)
    return {b: sorted(p) for b, p in found.items()}


@pytest.mark.parametrize(
    "image_size, patch, block, ratio, blocks",
    [(224, 16, 32, 0.6, 29), (96, 16, 32, 0.6, 5), (96, 8, 32, 0.6, 5), (64, 32, 32, 0.6, 2), (64, 16, 16, 0.5, 8)],
)
def test_patch_masks_are_an_exact_number_of_whole_blocks(image_size, patch, block, ratio, blocks):
    masking = Masking(patch_size=patch, mask_block=block, image_mask_ratio=ratio)
    ids = draw_patch_masks(3, 1, np.arange(200), image_size=image_size, masking=masking)
    assert ids.dtype == np.int64
    assert ids.shape == (200, blocks * (block // patch) ** 2)
    table = patches_of_blocks(image_size, patch, block)
    for row in ids.tolist():
        assert row == sorted(set(row))
        masked = [b for b, patches in table.items() if set(patches) <= set(row)]
        assert len(masked) == blocks
        assert sorted(itertools.chain.from_iterable(table[b] for b in masked)) == row


def test_every_set_of_blocks_is_equally_likely():
    draws = 12_600
    ids = draw_patch_masks(0, 0, np.arange(draws), image_size=96, masking=Masking(patch_size=32))
    _, counts = np.unique(ids, axis=0, return_counts=True)
    assert len(counts) == 126  # 5 of 9
    # Chi-square with 125 degrees of freedom: mean 125, standard deviation 15.8; bounds at four of them.
    assert 62 < ((counts - draws / 126) ** 2 / (draws / 126)).sum() < 188


@pytest.mark.parametrize("sizes", [(100, 16, 32), (96, 16, 64), (96, 12, 32), (96, 0, 32)])
def test_mask_sizes_that_do_not_fit_are_named(sizes):
    image_size, patch, block = sizes
    with pytest.raises(ValueError, match=r"mask_block|patch_size"):
        draw_patch_masks(0, 0, [0], image_size=image_size, masking=Masking(patch_size=patch, mask_block=block))


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.2])
def test_a_mask_ratio_that_masks_nothing_or_too_much_is_refused(ratio):
    with pytest.raises(ValueError, match="image_mask_ratio"):
        draw_patch_masks(0, 0, [0], image_size=96, masking=Masking(image_mask_ratio=ratio))


def test_token_masks_hold_the_exact_number_of_ordinary_tokens():
    lengths = np.array([3, 4, 5, 7, 12, 17, 24, 40, 3])
    ids = draw_token_masks(7, 2, np.arange(9), lengths)
    assert ids.dtype == np.int64
    assert ids.tolist() == sorted(set(ids.tolist()))
    begin = 0
    for length in lengths.tolist():
        inside = [i for i in ids.tolist() if begin <= i < begin + length]
        assert len(inside) == max(1, round(0.3 * (length - 2)))
        assert begin not in inside  # [CLS]
        assert begin + length - 1 not in inside  # [SEP]
        begin += length


def test_mask_counts_round_halves_to_even():
    for ordinary, wanted in ((5, 2), (15, 4), (25, 8)):  # 1.5, 4.5, 7.5
        assert len(draw_token_masks(0, 0, [0], [ordinary + 2])) == wanted == round(0.3 * ordinary)


def test_every_token_is_equally_likely():
    draws = 6000
    ids = draw_token_masks(0, 0, np.arange(draws), np.full(draws, 12))
    places = ids % 12
    counts = np.bincount(places, minlength=12)[1:11]
    assert counts.sum() == 3 * draws
    assert np.abs(counts - 0.3 * draws).max() < 5 * np.sqrt(draws * 0.3 * 0.7)


def test_captions_without_an_ordinary_token_are_refused():
    with pytest.raises(ValueError, match="got one of 2"):
        draw_token_masks(0, 0, [0, 1], [5, 2])


def test_masks_depend_on_the_sample_and_not_on_the_batch():
    samples, epochs = np.arange(40), np.arange(40) // 25
    lengths = 3 + samples % 9
    patches = draw_patch_masks(1, epochs, samples, image_size=96)
    tokens = np.split(
        draw_token_masks(1, epochs, samples, lengths),
        np.cumsum(np.maximum(1, np.rint(0.3 * (lengths - 2))))[:-1].astype(int),
    )
    begins = np.cumsum(lengths) - lengths
    for i in np.random.default_rng(0).permutation(40):
        one = slice(i, i + 1)
        assert np.array_equal(draw_patch_masks(1, epochs[one], samples[one], image_size=96)[0], patches[i])
        alone = draw_token_masks(1, int(epochs[i]), samples[one], lengths[one])
        assert np.array_equal(alone, tokens[i] - begins[i])


def test_masks_change_with_seed_epoch_and_sample():
    draws = [draw_patch_masks(s, e, [i], image_size=224).tobytes() for s in (0, 1) for e in (0, 1) for i in range(5)]
    assert len(set(draws)) == 20


SIZES: dict[str, Any] = {"image_size": 96}


def test_variable_patch_masks_are_whole_blocks_with_weights_that_add_up_to_the_patches():
    ids, weights = draw_variable_patch_masks(3, 1, range(200), **SIZES)
    assert ids.shape == weights.shape == (200, 36)
    for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        number = sum(w > 0 for w in weight)
        masked = row[:number]
        assert masked == sorted(set(masked))
        assert row[number:] == [masked[-1]] * (36 - number)
        blocks = {(p // 6 // 2, p % 6 // 2) for p in masked}
        assert number == 4 * len(blocks)
        assert weight == [np.float32(9 / len(blocks))] * number + [0.0] * (36 - number)


def test_a_variable_mask_with_the_count_of_a_ratio_is_the_mask_of_the_ratio():
    ids, weights = draw_variable_patch_masks(3, 1, range(200), **SIZES)
    fixed = draw_patch_masks(3, 1, range(200), **SIZES, masking=Masking(image_mask_ratio=5 / 9))
    rows = [i for i in range(200) if (weights[i] > 0).sum() == 20]
    assert rows
    assert all(ids[i, :20].tolist() == fixed[i].tolist() for i in rows)


def test_every_number_of_masked_blocks_is_equally_likely():
    _, weights = draw_variable_patch_masks(0, 0, range(18000), **SIZES)
    counts = np.bincount((weights > 0).sum(1) // 4, minlength=10)
    assert counts[0] == 0
    assert abs(counts[1:] - 2000).max() < 5 * 2000**0.5


def test_every_number_of_masked_tokens_is_equally_likely():
    lengths = [9] * 14000
    masked = draw_weighted_token_masks(0, 0, range(14000), lengths, ratio=None)
    counts = np.bincount(np.bincount(masked.ids // 9, minlength=14000), minlength=8)
    assert counts[0] == counts[8:].sum() == 0
    assert abs(counts[1:8] - 2000).max() < 5 * 2000**0.5


def test_weighted_loss_of_variable_masks_is_that_of_masked_diffusion():
    """Mean over draws of the weighted sum of losses that depend on the number masked, against the integral over t.

    c(k) is the loss of each of k masked tokens. With each of n tokens masked with probability t, the expected sum of
    losses over t, integrated over t, is the sum of c.
    """
    n, c = 5, [0.0, 3.0, 1.0, 4.0, 1.5, 9.0]
    draws = 40000
    masked = draw_weighted_token_masks(1, 0, range(draws), [n + 2] * draws, ratio=None)
    count = np.bincount(masked.ids // (n + 2), minlength=draws)
    found = (masked.weights * np.array(c)[count[masked.ids // (n + 2)]]).sum() / draws
    t = (np.arange(20000) + 0.5) / 20000
    binomial = [1, 5, 10, 10, 5, 1]
    expected = sum(binomial[k] * t**k * (1 - t) ** (n - k) * k * c[k] for k in range(1, n + 1))
    integral = (expected / t).mean()
    assert integral == pytest.approx(sum(c), rel=1e-6)
    assert found == pytest.approx(integral, rel=0.02)


def test_without_a_ratio_every_number_of_masked_tokens_is_equally_likely():
    lengths = np.full(6000, 8)  # six ordinary tokens
    chosen = draw_token_masks(3, 1, np.arange(6000), lengths, ratio=None)
    counts = np.bincount(np.bincount(chosen // 8, minlength=6000), minlength=7)
    assert counts[0] == 0
    assert counts.sum() == 6000
    assert np.abs(counts[1:] - 1000).max() < 5 * np.sqrt(1000)
    assert not set((chosen % 8).tolist()) & {0, 7}
    # A sample's mask does not depend on the batch, and differs between epochs.
    alone = draw_token_masks(3, 1, np.array([17]), np.array([8]), ratio=None)
    assert alone.tolist() == (chosen[chosen // 8 == 17] - 8 * 17).tolist()
    assert draw_token_masks(3, 2, np.arange(6000), lengths, ratio=None).tolist() != chosen.tolist()


def words_of(starts: np.ndarray, begin: int, length: int) -> list[list[int]]:
    """Positions of each word of the caption at `begin`, by a loop over its ordinary tokens."""
    words: list[list[int]] = []
    for i in range(begin + 1, begin + length - 1):
        if not words or starts[i]:
            words.append([])
        words[-1].append(i)
    return words


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_whole_words_are_masked_or_none_of_their_tokens(ratio):
    """Shares, counts and weights are those of words; special tokens start none."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 14, size=300)
    starts = rng.random(lengths.sum()) < 0.5
    masked = draw_weighted_token_masks(4, 1, range(300), lengths, ratio=ratio, starts=starts)
    begin, counts = 0, set()
    for length in lengths.tolist():
        words = words_of(starts, begin, length)
        inside = (masked.ids >= begin) & (masked.ids < begin + length)
        hidden = set(masked.ids[inside].tolist())
        chosen = [word for word in words if hidden & set(word)]
        assert sorted(hidden) == sorted(i for word in chosen for i in word)
        n, k = len(words), len(chosen)
        counts.add((n, k))
        if ratio is not None:
            assert k == max(1, round(0.3 * n))
            assert set(masked.weights[inside]) == {1.0}
        else:
            assert set(masked.weights[inside]) == {np.float32(n / k)}
        begin += length
    assert ratio is not None or {(5, k) for k in (1, 2, 3, 4, 5)} <= counts


def test_every_word_is_equally_likely_whatever_its_length():
    draws = 6000
    starts = np.tile([True, True, False, False, True, True, False, True], draws)  # of [CLS] and [SEP] nothing is read
    ids = draw_token_masks(0, 0, np.arange(draws), np.full(draws, 8), ratio=0.25, starts=starts)
    counts = np.bincount(ids % 8, minlength=8)
    assert counts[1] == counts[2] == counts[3]
    assert counts[5] == counts[6]
    first = counts[[1, 4, 5]]
    assert first.sum() == draws  # round(0.25 * 3) of 3 words
    assert np.abs(first - draws / 3).max() < 5 * np.sqrt(draws * 2 / 9)


def test_masks_of_words_that_are_tokens_are_masks_of_tokens():
    lengths = 3 + np.arange(40) % 9
    starts = np.ones(lengths.sum(), bool)
    same = draw_token_masks(1, 0, np.arange(40), lengths, starts=starts)
    assert same.tolist() == draw_token_masks(1, 0, np.arange(40), lengths).tolist()
