"""Exchange of features: each rank receives those of the images and captions that its own pairs drew as negatives.

The split sizes of the all-to-alls are known on the device first; the host reads them after it has queued other work.
An image is a sequence of one row here, and a caption one of as many as it has tokens.

Shape legend: W ranks, b pairs of a microbatch, n pairs of a rank, G pairs of the global batch, M rows of this rank, S
rows that it sends, D rows that it receives, K sequences, N patches, C width.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import compute_dtype
from mvlm.distributed.collectives import (
    AsyncOp,
    GlobalBatchLayout,
    Handle,
    HostNumbers,
    all_gather,
    all_to_all,
    join_side_stream,
    side_stream,
)
from mvlm.model.implementation import PairCaches, Streams
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.negatives import MatchingPairs, Negatives, NegativeSampling, matching_pairs, matching_weights


class PairFeatures(NamedTuple):
    """ITM's pairs of one microbatch, and the features of their images and captions."""

    image: Tensor
    """(B, 1+N, C), features of the images of this microbatch and of those drawn as negatives. `pairs` has indices into
    them."""
    text: PackedText
    pairs: MatchingPairs
    max_rows: int
    """Upper bound of the number of token rows of all pairs' captions: the own captions twice, and the drawn ones."""
    caches: PairCaches | None = None
    share: Tensor | None = None
    """Sum of these pairs' weights divided by that of the global batch, a float64 scalar; None if these are all pairs.
    """


class Splits(NamedTuple):
    """One all-to-all as this rank sees it: of the images, or captions, that one microbatch of all ranks drew."""

    starts: Tensor
    """int64 (W b,), first row of each sent sequence among this rank's rows."""
    lengths: Tensor
    """int64 (W b,), rows of each sent sequence, 0 after the last one."""
    place: Tensor
    """int64 (b,), the drawn negative of each pair of this rank, as its number among the sequences that arrive, each
    once."""
    cu_seqlens: Tensor
    """int32 (b + 1,), bounds of the sequences among the rows that arrive."""
    numbers: Tensor
    """int64 (2 W + 3,): rows sent and received by rank, sequences that arrive, rows of the longest, and rows of all
    drawn sequences, with repetitions."""


def exchange_splits(
    negatives: Negatives, lengths: Tensor, own_starts: Tensor, microbatch: int, layout: GlobalBatchLayout
) -> tuple[Splits, Splits]:
    """`Splits` of the two all-to-alls of one microbatch, of images and of captions, from the negatives of all G pairs.

    Args:
        lengths: int64 (G,), number of tokens of each caption.
        own_starts: int64 (n,), first row of each of this rank's captions.
        microbatch: its number on each rank.

    Nothing waits for the device.
    """
    block = layout.ranks * layout.pairs
    rows = slice(microbatch * block, (microbatch + 1) * block)
    ones, places = torch.ones_like(lengths), torch.arange(len(own_starts), device=lengths.device)
    images = _splits(negatives.images[rows], ones, places, layout)
    return images, _splits(negatives.texts[rows], lengths, own_starts, layout)


def _splits(columns: Tensor, lengths: Tensor, own_starts: Tensor, layout: GlobalBatchLayout) -> Splits:
    """`Splits` of the sequences with global indices columns int64 (W b,): b that rank 0 drew, b of rank 1, and so on.

    lengths, own_starts: as for `exchange_splits`, for sequences of this kind.
    """
    total, pairs, ranks = layout.total, layout.pairs, layout.ranks
    end = ranks * total
    receiver = torch.arange(ranks * pairs, device=columns.device) // pairs
    wanted = (receiver * total + columns).masked_fill(layout.owner(columns) != layout.rank, end)
    sent, sent_lengths, rows_sent = _each_once(wanted, lengths, ranks)
    mine = columns[layout.rank * pairs : (layout.rank + 1) * pairs]
    keys = layout.owner(mine) * total + mine
    received, received_lengths, rows_received = _each_once(keys, lengths, ranks)
    place = torch.searchsorted(received, keys)
    arrive, drawn = (received < end).sum(), received_lengths.index_select(0, place).sum()
    return Splits(
        own_starts.index_select(0, layout.position(sent % total)),
        sent_lengths,
        place,
        F.pad(received_lengths.cumsum(0), (1, 0)).int(),
        torch.cat([rows_sent, rows_received, torch.stack([arrive, received_lengths.max(), drawn])]),
    )


def _each_once(keys: Tensor, lengths: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort keys and drop repetitions: each key below W G once, ascending, and then W G in place of the others.

    Key r G + g is sequence g that goes to rank r, or comes from it.

    Returns the keys; the number of rows of each, 0 for W G; and the number of rows by rank, int64 (W,).
    """
    total = len(lengths)
    keys = keys.sort().values
    again = F.pad(keys[1:] == keys[:-1], (1, 0))
    keys = keys.masked_fill(again, ranks * total).sort().values
    lengths = lengths.index_select(0, keys % total).masked_fill(keys == ranks * total, 0)
    bounds = torch.searchsorted(keys, torch.arange(ranks + 1, device=keys.device) * total)
    return keys, lengths, F.pad(lengths.cumsum(0), (1, 0)).index_select(0, bounds).diff()


def rows_of_sequences(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Indices of the rows of some sequences, one sequence after another: int64 (total,).

    Sequence k has the rows starts[k] to starts[k] + lengths[k] - 1. total: sum of the lengths, a Python int.
    """
    ends = lengths.cumsum(0)
    number = torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(ends, number, right=True)
    return (starts + lengths - ends).index_select(0, sequence) + number


class RowExchange:
    """Asynchronous all-to-all of feature rows, of images or of captions, and of their gradients back.

    A rank adds up the gradients of a row in the order of the ranks they come from, in fp32 or float64.

    Args:
        own: rows (M, ...) of this rank.
        wire: dtype in which rows and gradients travel.
    """

    def __init__(self, own: Tensor, wire: torch.dtype) -> None:
        self._own, self._wire = own.detach(), wire

    def start(self, splits: Splits, numbers: list[int]) -> None:
        """Start to send this rank's rows, in the side stream. numbers: `splits.numbers` as Python ints."""
        ranks = len(numbers) // 2 - 1
        self._sent, self._received = numbers[:ranks], numbers[ranks : 2 * ranks]
        self._rows = rows_of_sequences(splits.starts, splits.lengths, sum(self._sent))  # (S,)
        sent = self._own.index_select(0, self._rows).to(self._wire)
        self._handle = all_to_all(sent, self._sent, self._received)

    def wait(self) -> Tensor:
        """Wait for the rows that arrive. Returns them, (D, ...), in the dtype `wire`."""
        x = self._handle.wait()
        join_side_stream(x, self._rows)
        return x

    def backward(self, grad: Tensor) -> Handle:
        """Start to send the gradient (D, ...) of the received rows back.

        The handle gives the gradient of this rank's own rows (M, ...).
        """
        handle = all_to_all(grad.contiguous(), self._received, self._sent)
        return Handle(None, lambda: sum_rows(handle.wait(), self._rows, len(self._own)).to(self._own.dtype))


def sum_rows(x: Tensor, rows: Tensor, number: int) -> Tensor:
    """Add x (S, ...) up by rows int64 (S,): row r of the result (number, ...) is the sum of all x[s] with rows[s] = r.

    Terms are added in the order of s, in fp32 or float64. `index_add_` would take an arbitrary order on CUDA.
    """
    ordered, order = rows.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(number + 1, device=rows.device))
    terms = x.index_select(0, order).flatten(1)
    terms = terms if terms.dtype == torch.float64 else terms.float()
    return torch.segment_reduce(terms, "sum", offsets=bounds, axis=0, unsafe=True).unflatten(1, x.shape[1:])


class FeatureExchange:
    """Exchange of the features of a step's negatives between ranks, in the dtype in which the step computes.

    1. `FeatureExchange(...)` gathers the draws of all ranks, computes the splits of all all-to-alls on the device,
       and starts to copy their numbers to the host.
    2. `start` reads the numbers and starts to send. What is queued between 1 and 2 keeps the device busy meanwhile.
    3. `wait` returns the rows.
    4. `backward` sends their gradients back. With one microbatch autograd calls it: the exchange is then part of the
       graph, at the place where it is made.

    1 and 2 run in the side stream, so that they neither wait for MLM and MIM nor these for them. In a world of one
    microbatch there is nothing to exchange, and its own features are the result.

    Args:
        draws: int64 (n, 2), global indices of the caption and of the image that each of this rank's pairs drew.
        lengths: int64 (G,), number of tokens of each caption of the global batch.
        streams: features of this rank's microbatches.
    """

    def __init__(
        self,
        draws: Tensor,
        sampling: NegativeSampling,
        lengths: Tensor,
        streams: Sequence[Streams],
        layout: GlobalBatchLayout,
    ) -> None:
        self._layout, self._started, self._exchanges, self._ops = layout, int(layout.alone), [[]], []
        if layout.alone:
            self._negatives = sampling.limited(*draws.unbind(1))
            return
        packings = [own.text.packing for own in streams]
        kinds = [own.image for own in streams], [own.text.rows for own in streams]
        self._own = [x[0] if len(x) == 1 else torch.cat(x) for x in kinds]
        """Feature rows of all images, and of all captions, of this rank."""
        wire = compute_dtype(self._own[0])
        firsts = accumulate((packing.total for packing in packings), initial=0)
        starts = torch.cat([p.cu_seqlens[:-1].long() + first for p, first in zip(packings, firsts, strict=False)])
        inputs = draws, sampling.image_id, sampling.text_id, lengths, *self._own, starts
        with side_stream(draws.device, *inputs):
            texts, images = all_gather(draws.int(), layout).wait().long().unbind(1)
            self._negatives = sampling.limited(texts, images)
            self._splits = [exchange_splits(self._negatives, lengths, starts, a, layout) for a in range(len(streams))]
            self._copied = HostNumbers(torch.stack([torch.stack([x.numbers for x in both]) for both in self._splits]))
        self._numbers: list[list[list[int]]] = []
        self._exchanges = [[RowExchange(own, wire) for own in self._own] for _ in streams]
        if not self._copied.on_the_way:
            self.start(0)
        if len(streams) == 1:
            kinds = zip(self._own, self._exchanges[0], strict=True)
            self._ops = [AsyncOp(own, exchange.wait, exchange.backward) for own, exchange in kinds]

    def start(self, microbatch: int) -> None:
        """Start to send the features of one microbatch's negatives, unless that has begun.

        The first call waits until the device has computed the numbers of rows. On a CPU, which queues nothing, sending
        the first microbatch has begun.
        """
        if microbatch < self._started:
            return
        self._started = microbatch + 1
        self._numbers = self._numbers or self._copied.read()
        kinds = self._exchanges[microbatch], self._splits[microbatch], self._numbers[microbatch]
        with side_stream(self._own[0].device):
            for exchange, splits, numbers in zip(*kinds, strict=True):
                exchange.start(splits, numbers)

    def wait(self, microbatch: int) -> list[Tensor]:
        """Features that one microbatch drew, each once: images (D, 1+N, C), and rows of captions.

        With one microbatch they are differentiable.
        """
        return [x.wait() for x in self._ops or self._exchanges[microbatch]]

    def pairs(self, microbatch: int, own: Streams, *arrived: Tensor) -> PairFeatures:
        """ITM's pairs of a microbatch, from its own features and from those that arrived (`wait`)."""
        ours = own.text.packing
        if self._layout.alone:
            most = 2 * ours.total + len(ours) * ours.max_length
            return PairFeatures(own.image, own.text, matching_pairs(self._negatives), most, own.caches)
        (image, rows), (images, texts) = arrived, self._splits[microbatch]
        captions, longest, drawn_rows = self._numbers[microbatch][1][-3:]
        join_side_stream(*self._negatives, images.place, texts.place, texts.cu_seqlens)
        # What has arrived comes first, because the own captions may end in padding rows.
        bounds = torch.cat([texts.cu_seqlens[: captions + 1], ours.cu_seqlens[1:] + len(rows)])
        packing = Packing(bounds, max(longest, ours.max_length), len(rows) + ours.total)
        mine = self._layout.indices(microbatch, image.device)
        drawn = Negatives(*(x.index_select(0, mine) for x in self._negatives))
        pairs = matching_pairs(drawn._replace(images=images.place, texts=texts.place), len(image), captions)
        return PairFeatures(
            torch.cat([image.to(own.image.dtype), own.image]),
            PackedText(torch.cat([rows.to(own.text.rows.dtype), own.text.rows]), packing),
            pairs,
            2 * ours.total + drawn_rows,
            share=pairs.weights.double().sum() / matching_weights(self._negatives).double().sum(),
        )

    def backward(self, microbatch: int, *grads: Tensor) -> list[Handle]:
        """Start to send back the gradients of what `wait` returned.

        The results are gradients of this rank's images (n, 1+N, C) and of its text rows.
        """
        return [x.backward(grad) for x, grad in zip(self._exchanges[microbatch], grads, strict=True)]
