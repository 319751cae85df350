"""Pixels on the CPU: resizing by several threads, and recycled buffers. `test_pipeline.py` compares with Pillow."""

import numpy as np
import pytest

from mvlm_dataloading.loader.pixels import Resize


@pytest.mark.parametrize("threads", [1, 3])
def test_crops_of_many_sizes_are_resized_into_an_array_in_their_order(threads):
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (*rng.integers(8, 90, 2), 3), dtype=np.uint8) for _ in range(40)]
    wanted = [Resize(16, 1, planes=True)([crop])[0] for crop in crops]
    images = np.zeros((40, 3, 16, 16), np.uint8)
    returned = Resize(16, threads, planes=True, into=lambda number: images[:number])(crops)
    assert np.array_equal(images, wanted)
    assert [one.size for one in returned] == [0] * 40
    assert np.array_equal(Resize(16, threads, planes=True)(crops), wanted)
    one = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)  # has the size already
    for planes in (True, False):
        assert np.array_equal(Resize(16, threads, planes=planes)([one])[0], one.transpose(2, 0, 1) if planes else one)
