"""A batch for one rank, and its parts for several ranks and microbatches."""

import itertools
from dataclasses import replace

from mvlm.distributed.world import World
from mvlm_dataloading import Batch, Masks
from support.models import micro_batch

LENGTHS = (7, 4, 12, 3, 9, 5, 3, 11, 12, 12, 3, 3, 8, 6, 10, 4)


def whole_batch() -> tuple[Batch, Masks]:
    """Sixteen pairs: one image three times, equal captions, and from 1 to 3 masked tokens a caption."""
    batch, masks = micro_batch(LENGTHS, seed=1)
    image_id, text_id = batch.image_id.clone(), batch.text_id.clone()
    image_id[[5, 13]] = 102
    text_id[[7, 8, 15]] = 200
    return replace(batch, image_id=image_id, text_id=text_id), masks


def piece(batch: Batch, masks: Masks, first: int, number: int) -> tuple[Batch, Masks]:
    """Pairs first to first + number - 1, as a batch."""
    starts = batch.cu_seqlens.tolist()
    rows, begin, end = slice(first, first + number), starts[first], starts[first + number]
    inside = (masks.token_ids >= begin) & (masks.token_ids < end)
    own = Masks(patch_ids=masks.patch_ids[rows], token_ids=masks.token_ids[inside] - begin)
    part = Batch(
        images=batch.images[rows],
        tokens=batch.tokens[begin:end],
        cu_seqlens=batch.cu_seqlens[first : first + number + 1] - begin,
        max_length=max(b - a for a, b in itertools.pairwise(starts[first : first + number + 1])),
        image_id=batch.image_id[rows],
        text_id=batch.text_id[rows],
        sample_id=batch.sample_id[rows],
    )
    return part, own


def pieces(world: World, number: int) -> list[tuple[Batch, Masks]]:
    """The `number` microbatches of one rank of `world`, cut from `whole_batch()`: ranks take turns."""
    size = len(LENGTHS) // (world.size * number)
    return [piece(*whole_batch(), (a * world.size + world.rank) * size, size) for a in range(number)]
