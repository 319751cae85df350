"""Layout of scenes: sizes, sides and cards."""

import random

import pytest

from mvlm_dataloading.scenes.layout import CARD, beside, boxes, card_box, is_beside, place
from mvlm_dataloading.scenes.vocabulary import SIDES, Kind

DOG, CAT = Kind("dog"), Kind("cat")
SHAPES = {"dog": (80, 80), "cat": (80, 31)}


def overlap(one: list[int], other: list[int]) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


@pytest.mark.parametrize("side", SIDES)
def test_cells_beside_a_cell(side: str) -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        subject, anchor, free = beside(rng, side)
        one, other, *others = place(rng, [DOG, CAT, DOG, DOG], [subject, anchor, *free[:2]]).objects
        assert is_beside(one, side, other)
        assert one.row == other.row or one.column == other.column
        assert not any(is_beside(further, side, other) for further in others)
        seen.add((subject, anchor))
    assert len(seen) == 9  # three lines, three pairs of places in each


def test_a_card_hides_its_cell_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = place(rng, [DOG] * 5)
        for one, box in zip(scene.objects, boxes(scene, SHAPES), strict=True):
            left, top, right, bottom = card_box(one.cell)
            x, y, wide, high = box
            assert left <= x < x + wide <= right
            assert top <= y < y + high <= bottom
            for other, there in zip(scene.objects, boxes(scene, SHAPES), strict=True):
                assert other is one or not overlap([left, top, right - left, bottom - top], there)
    assert card_box(4) == (64 - CARD // 2, 64 - CARD // 2, 64 + CARD // 2, 64 + CARD // 2)
