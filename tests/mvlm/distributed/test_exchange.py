"""Splits of exchanges against loops, sums of gradients in numpy, and the bound on a row that all want."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.exchange import Splits, exchange_splits, rows_of_sequences, sum_rows
from mvlm.objectives.negatives import MAX_PAIRS_PER_NEGATIVE, Negatives, NegativeSampling
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


def splits_of_all(negatives: Negatives, lengths: Tensor, microbatch: int) -> list[tuple[Splits, Splits]]:
    """Splits of all ranks for one microbatch. A rank's captions lie one after another."""
    found = []
    for layout in layouts():
        own = lengths[layout.own_indices(lengths.device)]
        found.append(exchange_splits(negatives, lengths, own.cumsum(0) - own, microbatch, layout))
    return found


@pytest.mark.parametrize("microbatch", range(MICROBATCHES))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [0, 1], ids=["images", "captions"])
def test_splits_of_all_ranks_against_a_loop(kind, seed, microbatch):
    """A rank sends, and the receiver expects, the distinct rows that the receiver's pairs drew."""
    negatives = random_negatives(seed)
    of_captions = np.random.default_rng(seed + 9).integers(3, 8, size=TOTAL)
    found = [both[kind] for both in splits_of_all(negatives, torch.from_numpy(of_captions), microbatch)]
    columns = (negatives.texts if kind else negatives.images).tolist()
    lengths = of_captions.tolist() if kind else [1] * TOTAL
    layout = layouts()
    own = [[lengths[i] for i in of.own_indices(torch.device("cpu")).tolist()] for of in layout]
    for receiver in range(RANKS):
        drawn = [columns[i] for i in layout[receiver].indices(microbatch, torch.device("cpu")).tolist()]
        arrived, expected = [], found[receiver].numbers.tolist()
        for owner in range(RANKS):
            wanted = sorted({i for i in drawn if rank_and_position(i)[0] == owner})
            arrived += wanted
            rows = []
            for place in (rank_and_position(i)[1] for i in wanted):
                rows += range(sum(own[owner][:place]), sum(own[owner][: place + 1]))
            splits = found[owner]
            sizes = splits.numbers[:RANKS].tolist()
            sent = rows_of_sequences(splits.starts, splits.lengths, sum(sizes)).tolist()
            assert sent[sum(sizes[:receiver]) : sum(sizes[: receiver + 1])] == rows
            assert expected[RANKS + owner] == len(rows)
        assert [arrived[place] for place in found[receiver].place.tolist()] == drawn
        sizes = [lengths[i] for i in arrived]
        assert expected[-3:] == [len(arrived), max(sizes), sum(lengths[i] for i in drawn)]
        assert found[receiver].cu_seqlens[: len(arrived) + 1].tolist() == np.cumsum([0, *sizes]).tolist()


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


@pytest.mark.parametrize("ranks", [4, 64, 512])
def test_a_row_that_all_want_is_sent_to_a_bounded_number_of_ranks(ranks):
    """Every pair draws image 0 and caption 1: without a limit their owner would send them to all other ranks."""
    layout = GlobalBatchLayout(0, ranks, 1, 2)
    everybody = torch.zeros(layout.total, dtype=torch.int64)
    lengths, starts = torch.full((layout.total,), 5), torch.tensor([0, 5])
    unlimited = Negatives(everybody + 1, everybody, everybody, everybody)
    images, _ = exchange_splits(unlimited, lengths, starts, 0, layout)
    assert int(images.numbers[:ranks].sum()) == ranks
    limited = negatives_of(everybody + 1, everybody)
    for splits, rows in zip(exchange_splits(limited, lengths, starts, 0, layout), (1, 5), strict=True):
        elsewhere = splits.numbers[1:ranks].tolist()
        assert sum(elsewhere) <= rows * MAX_PAIRS_PER_NEGATIVE
        # One reader is the owner's other pair, and the others are two on each rank.
        assert sum(elsewhere) == rows * min(ranks - 1, MAX_PAIRS_PER_NEGATIVE // 2)
    assert int(limited.text_weights.sum()) == min(layout.total - 1, MAX_PAIRS_PER_NEGATIVE)
