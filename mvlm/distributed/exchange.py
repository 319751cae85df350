"""Exchange of features: each rank receives those of the images and captions that its own pairs drew as negatives.

The numbers of rows (`mvlm.distributed.exchange_plan`) are known on the device first; the host reads them after it has
queued other work.

Shape legend: W ranks, b pairs of a microbatch, n pairs of a rank, G pairs of the global batch, M rows of this rank, S
rows that it sends, D rows that it receives, D <= b images or captions, N patches, C width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout, HostNumbers, InFlight, Journey, lane_of
from mvlm.distributed.contrastive import negatives_of_all
from mvlm.distributed.exchange_plan import plan_exchange, rows_of_sequences
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.negatives import Negatives, NegativeSampling


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
            self._negatives = negatives_of_all(draws, sampling, layout)
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
