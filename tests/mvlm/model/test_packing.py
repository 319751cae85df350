"""Packed rows against loops over their sequences."""

import pytest
import torch

from mvlm.model.packing import Packing, mask_tokens, round_up

LENGTHS = [[3, 1, 4], [5], [2, 2, 2, 6, 1]]


def make(lengths: list[int], tail: int) -> tuple[Packing, torch.Tensor]:
    """A packing with `tail` rows of no sequence at the end, and rows float64 (T, 2) to tell apart."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths) + tail
    return Packing(bounds, max(lengths) + 2, total), torch.arange(2.0 * total, dtype=torch.float64).view(total, 2) + 1


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_and_padding_against_loops(lengths, tail):
    packing, rows = make(lengths, tail)
    padded = packing.pad(rows)
    assert padded.shape == (len(lengths), max(lengths) + 2, 2)
    start = 0
    for b, length in enumerate(lengths):
        assert padded[b, :length].equal(rows[start : start + length])
        assert (padded[b, length:] == 0).all()
        assert packing.key_mask[b].tolist() == [j < length for j in range(max(lengths) + 2)]
        assert packing.sequence_of_row[start : start + length].tolist() == [b] * length
        start += length
    assert packing.sequence_of_row[start:].tolist() == [len(lengths)] * tail
    assert packing.unpad(padded)[:start].equal(rows[:start])


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("capacity", [0, 4])
def test_selected_sequences_against_a_loop(tail, capacity):
    packing, rows = make([3, 1, 4], tail)
    chosen = [2, 0, 0, 1, 2]
    wanted = [row for s in chosen for row in range(*[(0, 3), (3, 4), (4, 8)][s])]
    selected, taken = packing.select(torch.tensor(chosen), len(wanted) + capacity)
    assert taken[: len(wanted)].tolist() == wanted
    assert taken.max() < len(rows)  # what the capacity leaves over still points at a row
    assert selected.cu_seqlens.tolist() == [0, 4, 7, 10, 11, 15]
    assert selected.total == len(wanted) + capacity


def test_gradients_of_padding_reach_every_row_once():
    packing, rows = make([3, 1, 4], 2)
    rows.requires_grad_()
    (packing.pad(rows) * 3).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:8].eq(3).all()
    assert rows.grad[8:].eq(0).all()


def test_round_up():
    assert [round_up(n, 16) for n in (1, 16, 17, 32)] == [16, 16, 32, 32]


def test_masked_tokens_are_replaced_in_a_copy():
    tokens = torch.tensor([2, 11, 12, 3, 2, 13, 3])
    hidden = mask_tokens(tokens, torch.tensor([1, 5]), 4)
    assert hidden.tolist() == [2, 4, 12, 3, 2, 4, 3]
    assert tokens.tolist() == [2, 11, 12, 3, 2, 13, 3]
