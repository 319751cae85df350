"""Random patch and token masks with exact counts, as a function of (seed, epoch, sample id).

Shape legend: B samples, K masked patches per image, M masked tokens of all samples, T packed tokens, U units of all
samples.

A unit of a caption, which is masked as a whole, is an ordinary token or, with whole word masking, a word.

Polarity: ids name *masked* positions, which are replaced and have to be predicted.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.masking import Masking
from mvlm_dataloading.randomness import Purpose, hash64, uniforms
from mvlm_dataloading.tokenizer import Tokenizer

DEFAULT = Masking()
Int64 = NDArray[np.int64]


def draw_patch_masks(seed: int, epoch: Any, sample_ids: Any, *, image_size: int, masking: Masking = DEFAULT) -> Int64:
    """Masked patches of each image: int64 (B, K), row-major patch numbers.

    `Masking.masked_blocks` square blocks with sides of `mask_block` pixels are masked. All sets of blocks are equally
    likely. Those that MIM rebuilds come first; within them, and within the others, numbers ascend.

    Args:
        epoch: one number, or int (B,).

    Raises:
        ValueError: the masking does not fit the images (`Masking.check_image_size`).
    """
    masking.check_image_size(image_size)
    chosen = masking.masked_blocks(image_size)
    blocks = _ordered_blocks(seed, epoch, sample_ids, image_size // masking.mask_block)[:, :chosen]
    parts = np.split(blocks, [masking.rebuilt_blocks(image_size)], axis=1)
    return np.concatenate([np.sort(_patches_of(part, image_size, masking), axis=1) for part in parts], axis=1)  # (B, K)


def _ordered_blocks(seed: int, epoch: Any, sample_ids: Any, blocks_a_side: int) -> Int64:
    """Random order of the blocks of each image, int64 (B, blocks): block numbers, those to be masked first."""
    # Mask the blocks with the smallest keys. The sort is stable, so equal keys give the same result everywhere.
    keys = hash64(hash64(Purpose.PATCHES, seed, epoch, np.asarray(sample_ids))[:, None], np.arange(blocks_a_side**2))
    return np.argsort(keys, axis=1, kind="stable").astype(np.int64)


def _patches_of(blocks: Int64, image_size: int, masking: Masking) -> Int64:
    """Patches of blocks int64 (B, k), block by block: int64 (B, k times the patches of a block)."""
    blocks_a_side, patches_a_block = image_size // masking.mask_block, masking.mask_block // masking.patch_size
    patches_a_side = image_size // masking.patch_size
    inside = np.arange(patches_a_block)
    within = (inside[:, None] * patches_a_side + inside).ravel()  # patches of a block, relative to its top left patch
    top_left = (blocks // blocks_a_side * patches_a_side + blocks % blocks_a_side) * patches_a_block
    return (top_left[:, :, None] + within).reshape(len(blocks), -1)


def draw_token_masks(
    seed: int,
    epoch: Any,
    sample_ids: Any,
    lengths: Any,
    *,
    ratio: float | None = 0.3,
    starts: NDArray[np.bool_] | None = None,
) -> Int64:
    """Masked positions in the packed tokens: int64 (M,), ascending.

    Sample b has `lengths[b]` tokens including [CLS] and [SEP]. Of its n = lengths[b] - 2 ordinary tokens, exactly
    max(1, round(ratio n)) are masked, halves rounded to even. Without a ratio, 1 to n are masked, each number as likely
    as the others (the training of Mask-Predict, Ghazvininejad et al., EMNLP 2019). [CLS] and [SEP] are never masked.

    With `starts`, all tokens of a word are masked or none (whole word masking), and n is the number of words. A word
    whose other pieces are shown can be guessed without the image (ViLT, Kim et al., ICML 2021).

    Args:
        epoch: one number, or int (B,).
        starts: bool (T,), True for each packed token that starts a word. The first ordinary token always does.

    Raises:
        ValueError: a caption without an ordinary token, or a ratio outside [0, 1].
    """
    rows, positions, unit = _units(lengths, starts)
    numbers = np.bincount(rows, minlength=len(lengths))  # (B,), units of each caption
    if ratio is None:
        draws = uniforms(Purpose.TOKEN_COUNT, seed, epoch, np.asarray(sample_ids), 1)[:, 0]  # (B,)
        counts = 1 + (draws * numbers).astype(np.int64)
    elif 0 <= ratio <= 1:
        counts = np.maximum(1, np.rint(ratio * numbers)).astype(np.int64)  # rint rounds halves to even, like `round`
    else:
        raise ValueError(f"wanted a token mask ratio in [0, 1], got {ratio}")
    return positions[_choose_units(seed, epoch, sample_ids, rows, counts)[unit]]


def _units(lengths: Any, starts: NDArray[np.bool_] | None) -> tuple[Int64, Int64, Int64]:
    """Caption of each unit, int64 (U,); packed position of each ordinary token; and the unit of each of these tokens.

    lengths: tokens of each caption, special ones included. starts: as for `draw_token_masks`. ValueError for a caption
    without ordinary tokens.
    """
    lengths = np.asarray(lengths, np.int64)  # (B,)
    if len(lengths) and lengths.min() < 3:
        raise ValueError(f"wanted captions of at least 3 tokens with [CLS] and [SEP], got one of {lengths.min()}")
    of_token = np.repeat(np.arange(len(lengths)), lengths - 2)
    positions = np.arange(len(of_token)) + 2 * of_token + 1  # skip the special tokens before each one
    if starts is None:
        return of_token, positions, np.arange(len(of_token))
    first = np.diff(of_token, prepend=-1) > 0
    begins = first | starts[positions]
    return of_token[begins], positions, np.cumsum(begins) - 1


def _choose_units(seed: int, epoch: Any, sample_ids: Any, rows: Int64, counts: Int64) -> NDArray[np.bool_]:
    """Choose counts[b] random units of each caption b: bool (U,), True = chosen.

    Args:
        rows: int64 (U,), caption of each unit, ascending.
        counts: int64 (B,), number of units to choose of each caption.
    """
    first = np.searchsorted(rows, np.arange(len(counts)))  # (B,), the first unit of each caption
    place = np.arange(len(rows)) - first[rows]  # number within the caption
    keys = hash64(hash64(Purpose.TOKENS, seed, epoch, np.asarray(sample_ids))[rows], place)
    by_key = np.lexsort((keys, rows))  # caption by caption, each ordered by key
    chosen = np.zeros(len(rows), bool)
    # Captions keep their extent in `by_key`, so `place` is also the rank by key: take the first counts[b] of each.
    chosen[by_key[place < counts[rows]]] = True
    return chosen


class MaskDrawer:
    """Draws the masks of batches.

    Args:
        masking: settings of the masks.
        image_size: side of the images in pixels.
        tokenizer: tells which tokens start a word.
        seed: seed of the draws.
    """

    def __init__(self, masking: Masking, image_size: int, tokenizer: Tokenizer, seed: int) -> None:
        self._masking, self._image_size, self._seed = masking, image_size, seed
        self._word_starts = tokenizer.word_starts() if masking.whole_word_masking else None
        """True for each token of the vocabulary that starts a word, (V,); None to mask tokens one by one."""

    def __call__(
        self, image_epochs: Int64, images: Int64, text_epochs: Int64, texts: Int64, tokens: Int64, lengths: Int64
    ) -> dict[str, NDArray]:
        """Draw the masks of some images and captions. Returns the fields of `Masks` by name.

        Args:
            image_epochs, images: epoch and id of each image, int64 (images,).
            text_epochs, texts: epoch and id of each caption, int64 (captions,).
            tokens: int64 (T,), packed tokens of the captions.
            lengths: int64 (captions,), their numbers of tokens.
        """
        masking, seed = self._masking, self._seed
        starts = None if self._word_starts is None else self._word_starts[tokens]
        return {
            "patch_ids": draw_patch_masks(seed, image_epochs, images, image_size=self._image_size, masking=masking),
            "token_ids": draw_token_masks(
                seed, text_epochs, texts, lengths, ratio=masking.text_mask_ratio, starts=starts
            ),
        }
