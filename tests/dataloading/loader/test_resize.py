"""Resizing on the CPU while the interpreter exits. `test_pipeline.py` compares the pixels with Pillow's."""

import subprocess
import sys

import pytest

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
