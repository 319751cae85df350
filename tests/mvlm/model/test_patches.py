"""The grid of patches against loops."""

import math

import pytest
import torch
from torch import nn

from mvlm.model.patches import masked_patches, patchify, sine_positions, unpatchify, visible_patches
from support.models import normal


def test_masked_patches_against_a_loop():
    ids = torch.tensor([[0, 3, 5], [1, 2, 8], [6, 7, 8]])
    mask = masked_patches(ids, 9)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 9)
    for row in range(3):
        for patch in range(9):
            assert bool(mask[row, patch]) == (patch in ids[row].tolist())


def test_visible_patches_are_the_others():
    patch_ids = torch.tensor([[0, 3, 4], [1, 2, 8]])
    assert visible_patches(patch_ids, 9).tolist() == [[1, 2, 5, 6, 7, 8], [0, 3, 4, 5, 6, 7]]


def test_patchify_against_loops():
    images = normal(2, 3, 12, 12)
    rows = patchify(images, 4)
    assert rows.shape == (2, 9, 48)
    for b in range(2):
        for patch in range(9):
            top, left = patch // 3 * 4, patch % 3 * 4
            wanted = [images[b, c, top + y, left + x] for c in range(3) for y in range(4) for x in range(4)]
            assert rows[b, patch].tolist() == wanted


def test_patchify_has_the_order_of_a_convolutions_weight():
    images, convolution = normal(2, 3, 12, 12), nn.Conv2d(3, 5, 4, stride=4).double()
    assert convolution.bias is not None
    wanted = convolution(images).flatten(2).transpose(1, 2)
    found = patchify(images, 4) @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_unpatchify_is_the_inverse_of_patchify():
    images = normal(2, 3, 20, 20)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)
    patches = normal(2, 25, 48, seed=1)
    assert torch.equal(patchify(unpatchify(patches, 4), 4), patches)


def test_sine_positions_against_loops():
    side, width = 3, 16
    found = sine_positions(side, width)
    assert found.shape == (9, 16)
    assert found.dtype == torch.float32
    for patch in range(9):
        wanted = []
        for cell in (patch % 3, patch // 3):  # column, row
            coordinate = 2 * math.pi * (cell + 0.5) / side
            for wave in (math.sin, math.cos):
                wanted += [wave(coordinate / 10_000 ** (i / 4)) for i in range(4)]
        assert found[patch].tolist() == pytest.approx(wanted, abs=1e-7)


def test_sine_positions_are_those_of_places_whatever_the_grid():
    coarse, fine = sine_positions(2, 32).reshape(2, 2, 32), sine_positions(6, 32).reshape(6, 6, 32)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)  # of three cells in a row the middle one has the same centre


def test_sine_positions_need_a_width_that_four_divides():
    with pytest.raises(ValueError, match="width: wanted a multiple of 4, got 30"):
        sine_positions(3, 30)
