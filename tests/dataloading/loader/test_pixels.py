"""Pixels on the CPU: resizing, also while the interpreter exits, and recycled buffers. `test_pipeline.py` compares
with Pillow."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mvlm_dataloading.loader.pixels import BufferPool, Resize

_CODE = """
import concurrent.futures.thread
import numpy as np
from mvlm_dataloading.loader.pixels import Resize

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


def filled(value: int, rows: int = 4) -> torch.Tensor:
    return torch.full((rows, 3, 64, 64), value, dtype=torch.uint8)


def test_buffers_are_reused_only_when_nothing_refers_to_them():
    pool = BufferPool(spare=2)
    first = pool.copy(filled(1))
    view, place = first[2:3], first.data_ptr()
    del first
    second = pool.copy(filled(2))
    assert second.data_ptr() != place
    assert torch.equal(view, filled(1, 1))
    del view
    third = pool.copy(filled(3, 1))  # fewer rows, in the same buffer
    assert third.data_ptr() == place
    larger = pool.copy(filled(4, 8))
    for tensor, wanted in ((second, filled(2)), (third, filled(3, 1)), (larger, filled(4, 8))):
        assert torch.equal(tensor, wanted)
    del second, third, larger, tensor
    assert len(pool) == 2
    outlives = BufferPool().copy(filled(5))
    gc.collect()
    assert torch.equal(outlives, filled(5))


def test_a_forked_process_keeps_the_content_of_a_buffer():
    batch = BufferPool().copy(filled(1))
    here, there = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.read(there[0], 1)
        os.write(here[1], bytes([int(batch[0, 0, 0, 0])]))
        os._exit(0)
    batch.fill_(2)
    os.write(there[1], b".")
    assert os.read(here[0], 1) == b"\x01"
    os.waitpid(child, 0)
