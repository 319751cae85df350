"""Overlays of maps on images."""

import numpy as np
import torch

from mvlm.inference.attention_maps import AttentionMaps
from mvlm.inference.overlay import draw_overlay, draw_words

WHITE = np.full((32, 32, 3), 255, np.uint8)


def test_the_hottest_patch_is_red_and_the_coldest_dark():
    heat = torch.full((4, 4), 0.2)
    heat[1, 3], heat[3, 0] = 0.9, 0.1
    drawn = np.array(draw_overlay(WHITE, heat, side=60, strength=1.0))
    assert drawn.shape == (60, 60, 3)
    assert np.abs(drawn[22, 52].astype(int) - (122, 4, 3)).max() <= 2
    assert np.abs(drawn[52, 7].astype(int) - (48, 18, 59)).max() <= 2
    half = np.array(draw_overlay(WHITE, heat, side=60, strength=0.5)).astype(int)
    assert np.abs(half - np.round((drawn.astype(int) + 255) / 2)).max() <= 1
    assert (np.array(draw_overlay(WHITE, heat, side=60, strength=0.0)) == 255).all()


def test_a_map_without_differences_is_drawn():
    assert len(np.unique(np.array(draw_overlay(WHITE, torch.zeros(4, 4), side=32)).reshape(-1, 3), axis=0)) == 1


def test_each_word_has_a_panel():
    maps = torch.rand(3, 4, 4)
    found = AttentionMaps(
        ["[CLS]", "a", "b"], maps[None, None].expand(2, 2, -1, -1, -1), maps[None].expand(2, -1, -1, -1), 0.0
    )
    drawn = np.array(draw_words(WHITE, found, side=40, columns=3))
    assert drawn.shape == (2 * (40 + 18), 3 * 40, 3)  # the image and three words, in two rows
    assert (drawn[:40, :40] == 255).all()
    panel = np.array(draw_overlay(WHITE, maps[0], side=40))
    assert np.array_equal(drawn[:40, 40:80], panel)
    other = np.array(draw_words(WHITE, found, found.maps * 2 - 1, side=40, columns=4))
    assert np.abs(other[:40, 40:80].astype(int) - panel).max() <= 1  # a map is scaled, so its unit does not matter
