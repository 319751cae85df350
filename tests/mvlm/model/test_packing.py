"""Packed sequences against loops over the sequences."""

import pytest
import torch

from mvlm.model.packing import Packing, room_for

LENGTHS = [[3, 1, 4], [5], [2, 2, 2, 6, 1]]


def make(lengths: list[int], tail: int) -> tuple[Packing, torch.Tensor]:
    """A packing with `tail` rows of no sequence at the end, and distinct rows float64 (T, 2)."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths) + tail
    return Packing(bounds, max(lengths) + 2, total), torch.arange(2.0 * total, dtype=torch.float64).view(total, 2) + 1


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_pad_and_unpad_against_loops(lengths, tail):
    packing, rows = make(lengths, tail)
    padded = packing.pad(rows)
    assert padded.shape == (len(lengths), max(lengths) + 2, 2)
    start = 0
    for b, length in enumerate(lengths):
        assert padded[b, :length].equal(rows[start : start + length])
        assert (padded[b, length:] == 0).all()
        assert packing.key_mask[b].tolist() == [j < length for j in range(max(lengths) + 2)]
        assert packing.sequence_of_row[start : start + length].tolist() == [b] * length
        assert packing.position[start : start + length].tolist() == list(range(length))
        start += length
    assert packing.sequence_of_row[start:].tolist() == [len(lengths)] * tail
    assert packing.unpad(padded)[:start].equal(rows[:start])


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("capacity", [0, 4])
def test_selected_sequences_against_a_loop(tail, capacity):
    packing, rows = make([3, 1, 4], tail)
    sequences = [2, 0, 0, 1, 2]
    wanted = [row for s in sequences for row in range(*[(0, 3), (3, 4), (4, 8)][s])]
    selected, indices = packing.select(torch.tensor(sequences), len(wanted) + capacity)
    assert indices[: len(wanted)].tolist() == wanted
    assert indices.max() < len(rows)  # rows of no sequence still point at a row
    assert selected.cu_seqlens.tolist() == [0, 4, 7, 10, 11, 15]
    assert selected.total == len(wanted) + capacity


def test_room_for_drawn_sequences_on_a_cpu_is_their_rounded_total_in_bf16():
    packing, _ = make([30, 5, 9], 3)
    assert room_for(packing, torch.tensor([0, 0, 1]), None, torch.bfloat16) == 96  # 65
    assert room_for(packing, torch.tensor([2, 2, 1, 2]), 1, torch.bfloat16) == 32  # exactly; the bound is for a GPU
    assert room_for(packing, torch.tensor([0, 0, 1]), None, torch.float32) == 65


@pytest.mark.parametrize(("max_rows", "wanted"), [(None, 3 * 32), (70, 70), (1000, 3 * 32)])
def test_room_for_drawn_sequences_is_a_bound_where_their_total_is_unknown(max_rows, wanted):
    """A meta tensor has no numbers, so nothing can be read from it."""
    packing, _ = make([30, 5, 9], 3)
    assert room_for(packing, torch.empty(3, dtype=torch.long, device="meta"), max_rows, torch.bfloat16) == wanted
