"""Random patch and token masks with exact counts, as a function of (seed, epoch, sample id).

Shape legend: B samples, K masked patches per image, M masked tokens of all samples, T packed tokens.
Polarity: ids name *masked* positions, which are replaced and have to be predicted.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.randomness import Purpose, hash64, uniforms

Int64 = NDArray[np.int64]


def num_masked_blocks(image_size: int, mask_block: int, ratio: float) -> int:
    """Number of masked blocks: round(ratio * (image_size / mask_block)^2), halves to even.

    With a ratio of 0.6 and blocks of 32 px, 29 of 49 blocks at 224 px and 5 of 9 at 96 px.
    """
    return round(ratio * (image_size // mask_block) ** 2)


def check_mask_sizes(image_size: int, patch_size: int, mask_block: int, ratio: float) -> None:
    """Check that patches tile blocks, blocks tile the image, and at least one block is masked. Raises ValueError."""
    if min(image_size, patch_size, mask_block) < 1 or image_size % mask_block or mask_block % patch_size:
        raise ValueError(
            "wanted image_size divisible by mask_block, and mask_block divisible by patch_size; "
            f"got image_size {image_size}, mask_block {mask_block}, patch_size {patch_size}"
        )
    blocks = (image_size // mask_block) ** 2
    masked = num_masked_blocks(image_size, mask_block, ratio)
    if not 1 <= masked <= blocks:
        raise ValueError(
            f"wanted a mask ratio that masks between 1 and {blocks} blocks, got {ratio}, which masks {masked}"
        )


def check_token_ratio(ratio: float) -> None:
    """Check that a ratio is in [0, 1]. Raises ValueError."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"wanted a token mask ratio in [0, 1], got {ratio}")


def draw_patch_masks(
    seed: int,
    epoch: Any,
    sample_ids: Any,
    *,
    image_size: int,
    patch_size: int = 16,
    mask_block: int = 32,
    ratio: float = 0.6,
) -> Int64:
    """Masked patches of each image: int64 (B, K), row-major patch numbers, ascending within a row.

    `num_masked_blocks` square blocks with sides of `mask_block` pixels are masked. All sets of blocks are equally
    likely.

    Args:
        epoch: one number, or int (B,).

    Raises:
        ValueError: `mask_block` does not divide `image_size`, `patch_size` does not divide `mask_block`, or the ratio
            masks no block or more than all.
    """
    check_mask_sizes(image_size, patch_size, mask_block, ratio)
    blocks_a_side, patches_a_block = image_size // mask_block, mask_block // patch_size
    patches_a_side = image_size // patch_size
    chosen = num_masked_blocks(image_size, mask_block, ratio)

    # Mask the blocks with the smallest keys. The sort is stable, so equal keys give the same result everywhere.
    keys = hash64(hash64(Purpose.PATCHES, seed, epoch, np.asarray(sample_ids))[:, None], np.arange(blocks_a_side**2))
    blocks = np.argsort(keys, axis=1, kind="stable")[:, :chosen].astype(np.int64)  # (B, chosen)

    inside = np.arange(patches_a_block)
    within = (inside[:, None] * patches_a_side + inside).ravel()  # patches of a block, relative to its top left patch
    top_left = (blocks // blocks_a_side * patches_a_side + blocks % blocks_a_side) * patches_a_block
    return np.sort((top_left[:, :, None] + within).reshape(len(blocks), -1), axis=1)  # (B, K)


def draw_token_masks(seed: int, epoch: Any, sample_ids: Any, lengths: Any, *, ratio: float | None = 0.3) -> Int64:
    """Masked positions in the packed tokens: int64 (M,), ascending.

    Sample b has `lengths[b]` tokens including [CLS] and [SEP]. Of its n = lengths[b] - 2 ordinary tokens, exactly
    max(1, round(ratio n)) are masked, halves rounded to even. Without a ratio, 1 to n are masked, each number as likely
    as the others (the training of Mask-Predict, Ghazvininejad et al., EMNLP 2019). [CLS] and [SEP] are never masked.

    Args:
        epoch: one number, or int (B,).

    Raises:
        ValueError: a caption without an ordinary token, or a ratio outside [0, 1].
    """
    check_token_ratio(ratio or 0.0)
    lengths = np.asarray(lengths, np.int64)  # (B,)
    if len(lengths) and lengths.min() < 3:
        raise ValueError(f"wanted captions of at least 3 tokens with [CLS] and [SEP], got one of {lengths.min()}")
    ordinary = lengths - 2
    if ratio is None:
        share = uniforms(Purpose.TOKEN_COUNT, seed, np.broadcast_to(epoch, lengths.shape), np.asarray(sample_ids), 1)
        counts = 1 + np.floor(share[:, 0] * ordinary).astype(np.int64)
    else:
        counts = np.maximum(1, np.rint(ratio * ordinary)).astype(np.int64)  # rint rounds halves to even, like `round`

    first = np.cumsum(ordinary) - ordinary  # (B,) start of each sample among all ordinary tokens
    rows = np.repeat(np.arange(len(lengths)), ordinary)
    place = np.arange(len(rows)) - first[rows]  # position within the caption, [CLS] not counted
    keys = hash64(hash64(Purpose.TOKENS, seed, epoch, np.asarray(sample_ids))[rows], place)
    by_key = np.lexsort((keys, rows))  # sample by sample, each ordered by key
    # Samples keep their extent in `by_key`, so `place` is also the rank by key: take the first counts[b] of each.
    chosen = by_key[place < counts[rows]]
    return np.sort(chosen + 2 * rows[chosen] + 1)  # skip the special tokens before each one
