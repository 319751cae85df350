"""Resizing on the CPU, into an array and while the interpreter exits. `test_pipeline.py` compares with Pillow."""

import subprocess
import sys

import numpy as np
import pytest

from mvlm_dataloading.loader.resize import Resize

_CODE = """
import concurrent.futures.thread
import numpy as np
from mvlm_dataloading.loader.resize import Resize

crops = list(np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8))
resize = Resize(16, 2, planes=True)
before = resize(crops)
concurrent.futures.thread._python_exit()  # the interpreter calls it before daemon threads end
assert all(np.array_equal(a, b) for a, b in zip(before, resize(crops), strict=True))
"""


@pytest.mark.slow
def test_crops_are_resized_until_the_interpreter_has_ended():
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


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
