"""Plans of exchanges of features: rows that each rank sends to each other, from the draws of all ranks.

Every rank knows all draws and the lengths of all captions. It therefore knows, without being asked, which of its rows
others want, and in which order rows arrive: by owner, and from one owner by rising global index, each once.

Shape legend: W ranks, b pairs of a microbatch, n pairs of a rank, G pairs of the global batch, K captions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.objectives.negatives import Negatives


class Drawn(NamedTuple):
    """Images or captions that the pairs of one microbatch of all ranks drew, as this rank sees them: on the device."""

    sent: Tensor
    """int64 (W b,), positions among this rank's n of what it sends; what follows the last one is to be ignored."""
    sent_counts: Tensor
    """int64 (W,), number for each rank."""
    received: Tensor
    """int64 (b,), global indices of what arrives; what follows the last one is to be ignored."""
    received_counts: Tensor
    """int64 (W,), number from each rank."""
    place: Tensor
    """int64 (b,), place of each pair's negative among what arrives."""


def plan_drawn(columns: Tensor, layout: GlobalBatchLayout) -> Drawn:
    """Plan one exchange of the global indices columns int64 (W b,), drawn by one microbatch of rank 0, 1, and so on."""
    total, pairs, ranks = layout.total, layout.pairs, layout.ranks
    end = ranks * total
    reader = torch.arange(ranks * pairs, device=columns.device) // pairs
    wanted = (reader * total + columns).masked_fill(layout.owner(columns) != layout.rank, end)
    sent, sent_counts = _each_once(wanted, end, ranks)
    mine = columns[layout.rank * pairs : (layout.rank + 1) * pairs]
    keys = layout.owner(mine) * total + mine
    received, received_counts = _each_once(keys, end, ranks)
    place = torch.searchsorted(received, keys)
    return Drawn(layout.position(sent % total), sent_counts, received % total, received_counts, place)


def _each_once(keys: Tensor, end: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Each key below `end` once, in rising order, then `end` repeated; and how many each rank has, int64 (W,).

    Rank r has the keys from r end / W to (r + 1) end / W - 1.
    """
    keys = keys.sort().values
    again = F.pad(keys[1:] == keys[:-1], (1, 0))
    keys = keys.masked_fill(again, end).sort().values
    bounds = torch.arange(ranks + 1, device=keys.device) * (end // ranks)
    return keys, torch.searchsorted(keys, bounds).diff()


class Plan(NamedTuple):
    """Both exchanges of one microbatch, on the device."""

    images: Drawn
    texts: Drawn
    text_starts: Tensor
    """int64 (W b,), first row of each sent caption among this rank's text rows."""
    text_lengths: Tensor
    """int64 (W b,), rows of each sent caption, 0 after the last one."""
    cu_seqlens: Tensor
    """int32 (b + 1,), bounds of the captions that arrive."""
    numbers: Tensor
    """int64 (4 W + 3,): images sent and received by rank, text rows sent and received by rank, captions that arrive,
    rows of the longest, and rows of all drawn captions, with repetitions."""


def plan_exchange(
    negatives: Negatives, lengths: Tensor, own_starts: Tensor, microbatch: int, layout: GlobalBatchLayout
) -> Plan:
    """Plan the exchange of one microbatch from the negatives of all G pairs, without a sync.

    lengths int64 (G,) of all captions; own_starts int64 (n,), first rows of this rank's captions.
    """
    block = layout.ranks * layout.pairs
    rows = slice(microbatch * block, (microbatch + 1) * block)
    images, texts = plan_drawn(negatives.images[rows], layout), plan_drawn(negatives.texts[rows], layout)
    own_lengths = lengths.index_select(0, layout.own_indices(lengths.device))
    sent, sent_bounds = _rows_of(own_lengths.index_select(0, texts.sent), texts.sent_counts)
    received, received_bounds = _rows_of(lengths.index_select(0, texts.received), texts.received_counts)
    drawn = received.index_select(0, texts.place)
    ours = [texts.received_counts.sum(), received.max(), drawn.sum()]
    numbers = [images.sent_counts, images.received_counts, sent_bounds.diff(), received_bounds.diff()]
    return Plan(
        images,
        texts,
        own_starts.index_select(0, texts.sent),
        sent,
        F.pad(received.cumsum(0), (1, 0)).int(),
        torch.cat([*numbers, torch.stack(ours)]),
    )


def _rows_of(lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (K,) with 0 after the last caption, and the first rows of the ranks' captions, int64 (W + 1,)."""
    number = torch.arange(len(lengths), device=lengths.device)
    lengths = lengths * (number < counts.sum())
    bounds = F.pad(counts.cumsum(0), (1, 0))
    return lengths, F.pad(lengths.cumsum(0), (1, 0)).index_select(0, bounds)


def rows_of_sequences(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Rows int64 (total,) of sequences, one after another.

    Sequence k has the rows starts[k] to starts[k] + lengths[k] - 1; total, a host number, is the sum of the lengths.
    """
    ends = lengths.cumsum(0)
    number = torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(ends, number, right=True)
    return (starts + lengths - ends).index_select(0, sequence) + number
