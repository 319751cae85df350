"""Masks of patches and of tokens: counts, words, and fairness, by loops over pixels and tokens."""

import itertools

import numpy as np
import pytest

from mvlm_dataloading import Masking
from mvlm_dataloading.loader.masking import draw_patch_masks, draw_token_masks


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
    assert (ids.dtype, ids.shape) == (np.int64, (200, blocks * (block // patch) ** 2))
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


def test_masks_depend_on_the_sample_and_not_on_the_batch():
    samples, epochs = np.arange(40), np.arange(40) // 25
    lengths = 3 + samples % 9
    patches = draw_patch_masks(1, epochs, samples, image_size=96)
    starts = np.random.default_rng(2).random(lengths.sum()) < 0.5
    begins = np.cumsum(lengths) - lengths
    for settings in ({}, {"ratio": None}, {"starts": starts}):
        tokens = draw_token_masks(1, epochs, samples, lengths, **settings)
        for i in np.random.default_rng(0).permutation(40):
            one, own = slice(i, i + 1), (tokens >= begins[i]) & (tokens < begins[i] + lengths[i])
            if "starts" in settings:
                settings = {"starts": starts[begins[i] : begins[i] + lengths[i]]}
            alone = draw_token_masks(1, int(epochs[i]), samples[one], lengths[one], **settings)
            assert np.array_equal(alone, tokens[own] - begins[i])
            assert np.array_equal(draw_patch_masks(1, epochs[one], samples[one], image_size=96)[0], patches[i])
    draws = [draw_patch_masks(s, e, [i], image_size=224).tobytes() for s in (0, 1) for e in (0, 1) for i in range(5)]
    assert len(set(draws)) == 20
    draws = [draw_token_masks(s, e, [i], [99]).tobytes() for s in (0, 1) for e in (0, 1) for i in range(5)]
    assert len(set(draws)) == 20


def test_the_blocks_to_rebuild_come_first_and_are_drawn_at_random():
    """Two of five masked blocks of nine: each block of the image is as often among them as the others."""
    ordinary = draw_patch_masks(0, 0, range(9000), image_size=96)
    some = Masking(mim_share=0.4)
    assert some.rebuilt_blocks(96) == 2
    patches = draw_patch_masks(0, 0, range(9000), image_size=96, masking=some)
    assert np.array_equal(np.sort(patches, axis=1), ordinary)
    rebuilt = patches[:, :8]  # of 4 patches a block
    blocks = rebuilt // 12 * 3 + rebuilt % 6 // 2
    assert all(len({*row}) == 2 for row in blocks.tolist())
    assert abs(np.bincount(blocks.ravel(), minlength=9) / 4 - 2000).max() < 5 * 2000**0.5
    for share in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match="mim_share"):
            Masking(mim_share=share)


def test_every_number_of_masked_tokens_is_equally_likely():
    ids = draw_token_masks(0, 0, range(18000), [11] * 18000, ratio=None)
    counts = np.bincount(np.bincount(ids // 11, minlength=18000), minlength=10)
    assert (len(counts), counts[0]) == (10, 0)
    assert abs(counts[1:] - 2000).max() < 5 * 2000**0.5


def words_of(starts: np.ndarray | None, begin: int, length: int) -> list[list[int]]:
    """Positions of each word of the caption at `begin`, by a loop over its ordinary tokens."""
    words: list[list[int]] = []
    for i in range(begin + 1, begin + length - 1):
        if not words or starts is None or starts[i]:
            words.append([])
        words[-1].append(i)
    return words


@pytest.mark.parametrize("ratio", [None, 0.3, 0.5])
@pytest.mark.parametrize("whole_words", [False, True])
def test_an_exact_number_of_tokens_or_whole_words_is_masked(ratio, whole_words):
    """Shares and counts are those of words; special tokens start none. Halves are rounded to even."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 14, size=300)
    starts = rng.random(lengths.sum()) < 0.5 if whole_words else None
    ids = draw_token_masks(4, 1, range(300), lengths, ratio=ratio, starts=starts)
    assert ids.dtype == np.int64
    assert ids.tolist() == sorted(set(ids.tolist()))
    begin, counts = 0, set()
    for length in lengths.tolist():
        words = words_of(starts, begin, length)
        hidden = set(ids[(ids >= begin) & (ids < begin + length)].tolist())
        chosen = [word for word in words if hidden & set(word)]
        assert sorted(hidden) == sorted(i for word in chosen for i in word)
        n, k = len(words), len(chosen)
        counts.add((n, k))
        if ratio is not None:
            assert k == max(1, round(ratio * n))
        begin += length
    assert ratio is not None or {(5, k) for k in (1, 2, 3, 4, 5)} <= counts


def test_every_word_is_equally_likely_whatever_its_length():
    draws = 6000
    starts = np.tile([True, True, False, False, True, True, False, True], draws)  # of [CLS] and [SEP] nothing is read
    ids = draw_token_masks(0, 0, np.arange(draws), np.full(draws, 8), ratio=0.25, starts=starts)
    counts = np.bincount(ids % 8, minlength=8)
    assert counts[1] == counts[2] == counts[3]
    assert counts[5] == counts[6]
    assert counts[[1, 4, 5]].sum() == draws  # round(0.25 * 3) of 3 words
    assert np.abs(counts[[1, 4, 5]] - draws / 3).max() < 5 * np.sqrt(draws * 2 / 9)
