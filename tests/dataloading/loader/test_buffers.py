"""Recycled buffers of image batches."""

import gc
import os

import pytest
import torch

from mvlm_dataloading.loader.buffers import BufferPool


def filled(value: int, rows: int = 4) -> torch.Tensor:
    return torch.full((rows, 3, 64, 64), value, dtype=torch.uint8)


@pytest.mark.slow
def test_buffer_pool_copies():
    source = torch.randint(0, 256, (5, 3, 7, 9), dtype=torch.uint8)
    wanted = source.clone()
    copy = BufferPool().copy(source)  # and outlives what made it
    source.zero_()
    gc.collect()
    assert torch.equal(copy, wanted)
    copy += 1
    assert torch.equal(copy, wanted + 1)


def test_buffers_are_reused_only_when_nothing_refers_to_them():
    pool = BufferPool()
    first = pool.copy(filled(1))
    view, place = first[2:3], first.data_ptr()
    del first
    second = pool.copy(filled(2))
    assert second.data_ptr() != place
    assert torch.equal(view, filled(1, 1))
    del view
    third = pool.copy(filled(3))
    assert third.data_ptr() == place
    assert torch.equal(second, filled(2))
    assert torch.equal(third, filled(3))


def test_buffer_pool_serves_batches_of_several_sizes():
    pool = BufferPool()
    small, large = pool.copy(filled(1, 1)), pool.copy(filled(2, 8))
    del small
    again = pool.copy(filled(3, 8))
    assert again.shape == large.shape
    del large
    fewer = pool.copy(filled(4, 2))
    assert torch.equal(again, filled(3, 8))
    assert torch.equal(fewer, filled(4, 2))


def test_buffer_pool_keeps_a_bounded_number_of_spare_buffers():
    pool = BufferPool(spare=2)
    held = [pool.copy(filled(k)) for k in range(5)]
    assert len(pool) == 0
    held.clear()
    assert len(pool) == 2


def test_a_forked_process_keeps_the_content_of_a_buffer():
    pool = BufferPool()
    batch = pool.copy(filled(1))
    here, there = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.read(there[0], 1)
        os.write(here[1], bytes([int(batch[0, 0, 0, 0])]))
        os._exit(0)
    batch.fill_(2)
    os.write(there[1], b".")
    assert os.read(here[0], 1) == b"\x01"
    os.waitpid(child, 0)
