"""Exchange of features: each rank receives those of the images and captions that its own pairs drew as negatives.

The numbers of rows are known on the device first; the host reads them after it has
queued other work.

Shape legend: W ranks, b pairs of a microbatch, n pairs of a rank, G pairs of the global batch, M rows of this rank, S
rows that it sends, D rows that it receives, D <= b images or captions, K captions, N patches, C width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout, HostNumbers, InFlight, Journey, lane_of, start_gather
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.negatives import Negatives, NegativeSampling


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


class RowExchange(Journey):
    """All-to-all of rows of one kind, and of their gradients.

    Rows travel in the dtype `wire`, and so do their gradients. A rank adds up the gradients of a row in the order of
    the ranks they come from, in fp32 or float64.

    Args:
        own: rows (M, ...) of this rank.
    """

    def __init__(self, own: Tensor, wire: torch.dtype) -> None:
        self._own, self._wire, self._lane = own.detach(), wire, lane_of(own.device)

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        """Start to send the rows int64 (S,), by receiving rank. Called in the lane.

        sent and received are numbers of rows for each rank and from each rank.
        """
        self._rows, self._sent, self._received = rows, sent, received
        self._moving = _all_to_all(self._own.index_select(0, rows).to(self._wire), sent, received)

    def arrive(self) -> Tensor:
        """The received rows (D, ...), in the dtype `wire`."""
        with self._lane.joined() as hand_over:
            return hand_over(_wait(self._moving))

    def start_return(self, grad: Tensor) -> None:
        """Start to send the gradient (D, ...) of the received rows back."""
        with self._lane.after(self._lane.mark(), grad):
            self._moving = _all_to_all(grad.contiguous(), self._received, self._sent)

    def finish_return(self) -> Tensor:
        """The gradient (M, ...) of this rank's rows, in their dtype."""
        with self._lane.joined() as hand_over:
            return hand_over(sum_rows(_wait(self._moving), self._rows, len(self._own)).to(self._own.dtype))


Moving = tuple[Tensor, "dist.Work | None"]


def _all_to_all(x: Tensor, sent: list[int], received: list[int]) -> Moving:
    if len(sent) == 1:
        return x, None
    out = x.new_empty(sum(received), *x.shape[1:])
    return out, dist.all_to_all_single(out, x, received, sent, async_op=True)


def _wait(moving: Moving) -> Tensor:
    x, work = moving
    if work is not None:
        work.wait()
    return x


def sum_rows(x: Tensor, rows: Tensor, number: int) -> Tensor:
    """Add x (S, ...) up by rows int64 (S,): row r of the result (number, ...) is the sum of all x[s] with rows[s] = r.

    Terms are added in the order of s, in fp32 or float64. `index_add_` would take an arbitrary order on CUDA.
    """
    ordered, order = rows.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(number + 1, device=rows.device))
    terms = x.index_select(0, order).flatten(1)
    terms = terms if terms.dtype == torch.float64 else terms.float()
    return torch.segment_reduce(terms, "sum", offsets=bounds, axis=0, unsafe=True).unflatten(1, x.shape[1:])


class Arrived(NamedTuple):
    """Features of the drawn negatives of one microbatch, each image and caption once."""

    image: Tensor
    """(D, 1+N, C)."""
    text: PackedText
    """Captions that arrived."""
    image_place: Tensor
    """int64 (b,), image of each pair's negative."""
    text_place: Tensor
    """int64 (b,), caption of each pair's negative."""
    drawn_rows: int
    """Rows of the b drawn captions, with repetitions."""
    negatives: Negatives
    """Negatives of all G pairs."""


class FeatureExchange:
    """Exchange of the features of a step's negatives, one microbatch at a time.

    1. `FeatureExchange(...)` gathers the draws of all ranks, plans all exchanges on the device, and starts to copy
       their numbers to the host.
    2. `start` reads the numbers and starts to send. What is queued between 1 and 2 keeps the device busy meanwhile.
    3. `arrive` waits for the rows.
    4. `start_return` and `finish_return` send the gradients back. In the autograd graph (`join_graph`), backward does.

    All this happens in the device's lane, so that it neither waits for MLM and MIM nor they for it.

    Args:
        draws: int64 (n, 2), what this rank's pairs drew (`sharded_contrastive_loss`).
        lengths: int64 (G,), rows of all captions.
        image: (n, 1+N, C), features of this rank's images.
        texts: captions of this rank, one packing for each microbatch.
        wire: dtype in which features travel.
    """

    def __init__(
        self,
        draws: Tensor,
        sampling: NegativeSampling,
        lengths: Tensor,
        image: Tensor,
        texts: list[PackedText],
        layout: GlobalBatchLayout,
        wire: torch.dtype,
    ) -> None:
        self._layout, self._image = layout, image
        self._text = texts[0].rows if len(texts) == 1 else torch.cat([text.rows for text in texts])
        first, starts = 0, []
        for text in texts:
            starts.append(text.packing.cu_seqlens[:-1].long() + first)
            first += text.packing.total
        own_starts = torch.cat(starts)
        self._lane = lane_of(image.device)
        inputs = (draws, sampling.image_id, sampling.text_id, lengths, image, self._text, own_starts)
        with self._lane.after(self._lane.mark(), *inputs):
            drawn_texts, drawn_images = start_gather(draws.int(), layout).wait().long().unbind(1)
            self._negatives = sampling.limited(drawn_texts, drawn_images)
            self._plans = [
                plan_exchange(self._negatives, lengths, own_starts, number, layout)
                for number in range(layout.microbatches)
            ]
            self._copied = HostNumbers(torch.stack([plan.numbers for plan in self._plans]))
        self._numbers: list[list[int]] = []
        self._journeys = [(RowExchange(image, wire), RowExchange(self._text, wire)) for _ in self._plans]
        self._started = 0
        self._flights: tuple[InFlight, InFlight] | None = None
        if not self._copied.on_the_way:
            self.start(0)

    def join_graph(self) -> None:
        """Make the exchange of the only microbatch part of the autograd graph, at this place in forward."""
        (images, texts), *others = self._journeys
        assert not others
        self._flights = InFlight(self._image, images), InFlight(self._text, texts)

    def start(self, microbatch: int) -> None:
        """Start to send, unless that has begun. The first call waits until the device has made the numbers.

        On a CPU, which queues nothing, sending the first microbatch has begun.
        """
        if microbatch < self._started:
            return
        self._started = microbatch + 1
        self._numbers = self._numbers or self._copied.read()
        plan, (images, texts), ranks = self._plans[microbatch], self._journeys[microbatch], self._layout.ranks
        numbers = self._numbers[microbatch]
        images_sent, images_received, rows_sent, rows_received = (
            numbers[k * ranks : (k + 1) * ranks] for k in range(4)
        )
        with self._lane.after(None):
            images.start(plan.images.sent[: sum(images_sent)], images_sent, images_received)
            rows = rows_of_sequences(plan.text_starts, plan.text_lengths, sum(rows_sent))
            texts.start(rows, rows_sent, rows_received)

    def arrive(self, microbatch: int) -> Arrived:
        """Wait for the features. They are differentiable after `join_graph`."""
        plan = self._plans[microbatch]
        captions, longest, drawn_rows = self._numbers[microbatch][-3:]
        image, rows = (x.arrive() for x in self._flights or self._journeys[microbatch])
        with self._lane.joined() as hand_over:
            negatives = Negatives(*map(hand_over, self._negatives))
            places = hand_over(plan.images.place), hand_over(plan.texts.place)
            packing = Packing(hand_over(plan.cu_seqlens)[: captions + 1], longest, len(rows))
        return Arrived(image, PackedText(rows, packing), *places, drawn_rows, negatives)

    def start_return(self, microbatch: int, image: Tensor, text: Tensor) -> None:
        """Start to send back the gradients of `Arrived.image` and of the rows of `Arrived.text`."""
        for journey, grad in zip(self._journeys[microbatch], (image, text), strict=True):
            journey.start_return(grad)

    def finish_return(self, microbatch: int) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's images (n, 1+N, C), and of its text rows, those of all microbatches together."""
        images, texts = self._journeys[microbatch]
        return images.finish_return(), texts.finish_return()
