"""Pointing game (Zhang et al., ECCV 2016): does the highest point of a map fall into the object's box?"""

from collections.abc import Sequence

import numpy as np


def box_contains(box: Sequence[float], point: Sequence[float]) -> bool:
    """True if the point (x, y) lies in the box (x, y, width, height), its left and upper edge included."""
    (left, top, width, height), (x, y) = box, point
    return left <= x < left + width and top <= y < top + height


def pointing_figures(
    points: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Accuracy of points in per cent, beside two baselines that look at no image.

    Args:
        points: (examples, 2), x and y in pixels.
        boxes: (examples, 4), x, y, width and height in pixels.
        sizes: (examples, 2), width and height of the image in pixels.

    Returns:
        accuracy; `center`, the accuracy of the image's centre; `chance`, the mean share of the image that a box covers.
    """
    hits = [box_contains(box, point) for box, point in zip(boxes, points, strict=True)]
    center = [box_contains(box, (size[0] / 2, size[1] / 2)) for box, size in zip(boxes, sizes, strict=True)]
    area = [box[2] * box[3] / (size[0] * size[1]) for box, size in zip(boxes, sizes, strict=True)]
    return {
        "accuracy": 100 * float(np.mean(hits)),
        "center": 100 * float(np.mean(center)),
        "chance": 100 * float(np.mean(area)),
    }
