"""Plans of exchanges against loops over all ranks, sums of gradients in numpy, and the bound on a row that all want.

The host reads nothing of ITC, the draws and the exchange but the numbers of rows, once, after other work.
"""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mvlm.costs.step_cost import StepShape, simulated_ranks, uniform_draws
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.exchange import FeatureExchange, Plan, plan_exchange, sum_rows
from mvlm.distributed.global_batch import Embeddings, sharded_contrastive_loss
from mvlm.model.packing import PackedText, Packing
from mvlm.objectives.negatives import MAX_READERS, Negatives, NegativeSampling
from support.models import normal

RANKS, MICROBATCHES, PAIRS = 5, 2, 3
TOTAL = RANKS * MICROBATCHES * PAIRS


def layouts(ranks: int = RANKS, microbatches: int = MICROBATCHES, pairs: int = PAIRS) -> list[GlobalBatchLayout]:
    return [GlobalBatchLayout(rank, ranks, microbatches, pairs) for rank in range(ranks)]


def negatives_of(texts: Tensor, images: Tensor) -> Negatives:
    return NegativeSampling(texts, texts, 0, 0).limited(texts, images)


def random_negatives(seed: int, total: int = TOTAL) -> Negatives:
    """Few columns are drawn, so that many are drawn several times, some by pairs of one rank."""
    rng = np.random.default_rng(seed)
    return negatives_of(*(torch.from_numpy(rng.integers(0, total // 2, size=total)) for _ in range(2)))


def rank_and_position(index: int, ranks: int = RANKS, pairs: int = PAIRS) -> tuple[int, int]:
    """Rank of a pair and its position among the rank's pairs, counted block by block."""
    block, within = divmod(index, pairs)
    return block % ranks, block // ranks * pairs + within


def plans(negatives: Negatives, lengths: Tensor, microbatch: int) -> list[Plan]:
    """Plans of all ranks for one microbatch. A rank's captions lie one after another."""
    found = []
    for layout in layouts():
        own = lengths[layout.own_indices(lengths.device)]
        found.append(plan_exchange(negatives, lengths, own.cumsum(0) - own, microbatch, layout))
    return found


@pytest.mark.parametrize("microbatch", range(MICROBATCHES))
@pytest.mark.parametrize("seed", range(3))
def test_plans_of_all_ranks_against_a_loop(seed, microbatch):
    """What a rank sends, and what another expects from it, are the distinct rows that the other's pairs drew."""
    negatives = random_negatives(seed)
    lengths = torch.from_numpy(np.random.default_rng(seed + 9).integers(3, 8, size=TOTAL))
    found = plans(negatives, lengths, microbatch)
    layout = layouts()
    for reader in range(RANKS):
        mine = layout[reader].indices(microbatch, torch.device("cpu")).tolist()
        for kind, columns in (("images", negatives.images), ("texts", negatives.texts)):
            arrived = []
            for owner in range(RANKS):
                wanted = sorted({int(columns[i]) for i in mine if rank_and_position(int(columns[i]))[0] == owner})
                arrived += wanted
                sends = getattr(found[owner], kind)
                counts = sends.sent_counts.tolist()
                before = sum(counts[:reader])
                positions = [rank_and_position(index)[1] for index in wanted]
                assert sends.sent[before : before + counts[reader]].tolist() == positions
                assert int(getattr(found[reader], kind).received_counts[owner]) == len(wanted)
            receives = getattr(found[reader], kind)
            assert receives.received[: len(arrived)].tolist() == arrived
            assert [arrived[place] for place in receives.place.tolist()] == [int(columns[i]) for i in mine]
        captions, longest, drawn_rows = found[reader].numbers[-3:].tolist()
        rows = [int(lengths[index]) for index in arrived]  # of the captions
        assert captions == len(arrived)
        assert longest == max(rows)
        assert drawn_rows == sum(int(lengths[int(negatives.texts[i])]) for i in mine)
        assert found[reader].cu_seqlens[: captions + 1].tolist() == np.cumsum([0, *rows]).tolist()


def test_sums_of_rows_against_numpy():
    rows, x = torch.tensor([3, 0, 3, 5, 0, 3]), normal(6, 2, 4, seed=1)
    wanted = np.zeros((7, 2, 4))
    np.add.at(wanted, rows.numpy(), x.numpy())
    np.testing.assert_allclose(sum_rows(x, rows, 7).numpy(), wanted, rtol=1e-15)


def test_sums_of_rows_in_bf16_are_exact_to_fp32_and_have_one_order():
    """Adding 1 to 256 in bf16 would leave 256."""
    x = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert sum_rows(x, torch.zeros(3, dtype=torch.int64), 1).tolist() == [[258.0]]
    terms = torch.tensor([[1e8], [1.0], [-1e8]])  # in fp32 the order shows
    first = torch.zeros(3, dtype=torch.int64)
    assert sum_rows(terms, first, 1).item() == 0.0
    assert sum_rows(terms[[0, 2, 1]], first, 1).item() == 1.0


class OneRank:
    """A world of one with two microbatches: an exchange without a process group."""

    def __init__(self, seed: int) -> None:
        self.layout = GlobalBatchLayout(0, 1, 2, 3)
        self.lengths = torch.tensor([4, 2, 5, 3, 3, 6])
        self.negatives = random_negatives(seed, 6)
        self.image = normal(6, 2, 3, seed=seed)
        self.rows = normal(23, 3, seed=seed + 1)
        # The first microbatch's captions end in padding rows.
        packings = (
            Packing(torch.tensor([0, 4, 6, 11], dtype=torch.int32), 5, 11),
            Packing(torch.tensor([0, 3, 6, 12], dtype=torch.int32), 6, 12),
        )
        self.texts = [PackedText(torch.cat([self.rows[:11], normal(2, 3)]), packings[0])]
        self.texts[0] = PackedText(self.texts[0].rows, Packing(packings[0].cu_seqlens, 5, 13))
        self.texts.append(PackedText(self.rows[11:], packings[1]))

    def exchange(self, image: Tensor | None = None, wire: torch.dtype = torch.float64) -> FeatureExchange:
        draws = torch.stack([self.negatives.texts, self.negatives.images], dim=1)
        sampling = NegativeSampling(self.lengths, self.lengths, 0, 0)
        image = self.image if image is None else image
        return FeatureExchange(draws, sampling, self.lengths, image, self.texts, self.layout, wire)


@pytest.mark.parametrize("seed", range(3))
def test_features_that_arrive_are_those_drawn(seed):
    world = OneRank(seed)
    exchange = world.exchange()
    starts = world.lengths.cumsum(0) - world.lengths
    for number in range(2):
        exchange.start(number)
        arrived = exchange.arrive(number)
        for i in range(3):
            pair = 3 * number + i
            assert torch.equal(arrived.image[arrived.image_place[i]], world.image[world.negatives.images[pair]])
            bounds, place = arrived.text.packing.cu_seqlens, arrived.text_place[i]
            column = world.negatives.texts[pair]
            wanted = world.rows[starts[column] : starts[column] + world.lengths[column]]
            assert torch.equal(arrived.text.rows[bounds[place] : bounds[place + 1]], wanted)
        assert len(arrived.image) == len(set(world.negatives.images[3 * number : 3 * number + 3].tolist()))


def test_gradients_return_to_the_rows_they_belong_to():
    world = OneRank(1)
    exchange = world.exchange()
    starts = [0, 4, 6, 13, 16, 19]  # two padding rows after the third caption
    for number in range(2):
        exchange.start(number)
        arrived = exchange.arrive(number)
        image, text = normal(*arrived.image.shape, seed=number + 5), normal(*arrived.text.rows.shape, seed=number + 7)
        exchange.start_return(number, image, text)
        returned = exchange.finish_return(number)
        wanted_image, wanted_text = np.zeros((6, 2, 3)), np.zeros((25, 3))
        for row, column in enumerate(sorted(set(world.negatives.images[3 * number : 3 * number + 3].tolist()))):
            wanted_image[column] += image[row].numpy()
        first = 0
        for column in sorted(set(world.negatives.texts[3 * number : 3 * number + 3].tolist())):
            length = int(world.lengths[column])
            wanted_text[starts[column] : starts[column] + length] += text[first : first + length].numpy()
            first += length
        np.testing.assert_allclose(returned[0].numpy(), wanted_image, rtol=1e-15)
        np.testing.assert_allclose(returned[1].numpy(), wanted_text, rtol=1e-15)
        assert returned[0].abs().sum() > 0


@pytest.mark.parametrize("ranks", [4, 64, 512])
def test_a_row_that_all_want_is_sent_to_a_bounded_number_of_ranks(ranks):
    """Every pair draws image 0 and caption 1: without a limit their owner would send them to all other ranks."""
    layout = GlobalBatchLayout(0, ranks, 1, 2)
    everybody = torch.zeros(layout.total, dtype=torch.int64)
    lengths, starts = torch.full((layout.total,), 5), torch.tensor([0, 5])
    unlimited = Negatives(everybody + 1, everybody, everybody, everybody)
    plan = plan_exchange(unlimited, lengths, starts, 0, layout)
    assert int(plan.images.sent_counts.sum()) == ranks
    limited = negatives_of(everybody + 1, everybody)
    plan = plan_exchange(limited, lengths, starts, 0, layout)
    for drawn in (plan.images, plan.texts):
        elsewhere = drawn.sent_counts.tolist()[1:]
        assert sum(elsewhere) <= MAX_READERS
        # One reader is the owner's other pair, and the others are two on each rank.
        assert sum(elsewhere) == min(ranks - 1, MAX_READERS // 2)
    assert int(limited.text_weights.sum()) == min(layout.total - 1, MAX_READERS)


def test_features_and_their_gradients_travel_in_the_given_dtype():
    world = OneRank(2)
    exchange = world.exchange(world.image.float(), torch.bfloat16)
    exchange.start(0)
    arrived = exchange.arrive(0)
    assert arrived.image.dtype == arrived.text.rows.dtype == torch.bfloat16
    exchange.start_return(0, torch.ones_like(arrived.image), torch.ones_like(arrived.text.rows))
    image, text = exchange.finish_return(0)
    assert (image.dtype, text.dtype) == (torch.float32, torch.float64)  # those of the rank's own features


SHAPE = StepShape(pairs=4, ranks=8, tokens=5)
LAYOUT = GlobalBatchLayout(0, 8, 1, 4)
NUMBERS = uniform_draws(SHAPE)
log: list[str] = []


class NumbersOfADevice:
    """Numbers that are on their way to the host until they are read."""

    on_the_way = True

    def __init__(self, x: Tensor) -> None:
        pass

    def read(self) -> list[list[int]]:
        """Numbers of a draw in which each row is drawn once."""
        log.append("read")
        return NUMBERS


def run(read: bool = False) -> Any:
    """Forward and backward on fake tensors, which have no values: an operation that needs one raises."""

    def leaf(*sizes: int) -> Tensor:
        return torch.empty(sizes, requires_grad=True)

    log.clear()
    with (
        simulated_ranks(8),
        patch("mvlm.distributed.exchange.HostNumbers", NumbersOfADevice),
        FakeTensorMode(),
    ):
        ids = torch.empty(32, dtype=torch.int64)
        sampling = NegativeSampling(ids, ids, 0, 1)
        embeddings = Embeddings(leaf(4, 8), leaf(4, 8), LAYOUT)
        loss, _, draws = sharded_contrastive_loss(embeddings, leaf(1), sampling, LAYOUT)
        if read:
            draws.tolist()
        image, rows = leaf(4, 3, 2), leaf(20, 2)
        text = PackedText(rows, Packing(torch.empty(5, dtype=torch.int32), 5, 20))
        exchange = FeatureExchange(draws, sampling, ids, image, [text], LAYOUT, torch.bfloat16)
        exchange.join_graph()
        log.append("other work")
        exchange.start(0)
        arrived = exchange.arrive(0)
        (loss + arrived.image.sum() + arrived.text.rows.sum()).backward()
        assert image.grad is not None
        assert rows.grad is not None
        return image.grad.shape, rows.grad.shape


@pytest.mark.slow
def test_the_host_reads_the_numbers_once_and_after_other_work():
    assert run() == ((4, 3, 2), (20, 2))
    assert log == ["other work", "read"]
    with pytest.raises(DataDependentOutputException):  # another read would be noticed
        run(read=True)
