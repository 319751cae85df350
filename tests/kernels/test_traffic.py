"""Bytes that the kernels move, counted in the interpreter: within a few per cent of the fewest possible."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm_kernels import cases, dispatch, traffic, use_backend
from mvlm_kernels.cache_model import Cache, caching
from mvlm_kernels.cross_attention.arguments import invert_key_index

CASES = {f"{case.op} {case.shape}": case for case in cases.cases()}
DIRECT = [name for name, case in CASES.items() if case.moved is None]


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # inputs are not initialised: bytes count
def test_kernels_move_few_bytes_beyond_the_minimum(name, monkeypatch):
    case = CASES[name]
    if "R" in case.samples:  # rows past one wave: a 33rd of them on a GPU with a 33rd of the multiprocessors
        monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 4)
        case = replace(case, samples={"R": tuple(rows // 33 for rows in case.samples["R"])})
    forward, backward = traffic.moved(case)
    fewest_forward, fewest_backward = case.minimum(case.sizes)
    assert fewest_forward <= forward * 1.001
    assert forward <= 1.05 * fewest_forward
    assert backward <= 1.10 * fewest_backward


def test_cache_keeps_the_sectors_used_last_and_writes_back_what_was_written():
    cache = Cache(3 * 32)
    everything = np.ones(1, dtype=bool)

    def access(sector: int, *, write: bool = False) -> int:
        before = cache.bytes
        cache.access(np.array([sector * 32 + 4]), everything, 4, write=write)
        return cache.bytes - before

    assert [access(s) for s in (1, 2, 1, 3)] == [32, 32, 0, 32]
    assert access(4, write=True) == 0  # evicts 2, which nobody wrote; a store reads nothing
    assert [access(s) for s in (1, 3, 4)] == [0, 0, 0]
    assert [access(s) for s in (5, 6, 7)] == [32, 32, 64]  # the last one evicts 4
    cache.access(np.array([94, 500]), np.array([True, False]), 4, write=False)
    assert cache.bytes == 32 * 7 + 32 * 2  # across a border: two sectors; a masked lane: none
    before = cache.bytes
    access(9, write=True)
    cache.flush()
    assert cache.bytes == before + 32


@pytest.mark.slow
@pytest.mark.plain_empty
def test_readers_of_a_key_sequence_find_it_in_cache():
    """Walked in the order of key_index; in the order of the batch, every reader fetches its images again."""
    (case,) = [c for c in cases.cases() if "key_index" in c.shape]
    fewest, _ = case.minimum(case.sizes)
    (q, k, v), _ = case.run(case.sizes, "cpu")
    index = cases.pair_index(case.sizes["B"])
    order, spans = invert_key_index(index, case.sizes["B"])
    moved = []
    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "checks_values", lambda device: False)
        for walked in (order, torch.arange(len(index))):
            sides = (None, None, index, None, None, walked, spans, 0.125, q.shape[1], k.shape[1], 0.0, None)
            with caching(cases.L2 // 192) as cache, torch.no_grad():
                torch.ops.mvlm_kernels.cross_attention(q, k, v, *sides)
            moved.append(cache.bytes / fewest)
    assert moved[0] <= 1.1
    assert moved[1] > 1.7
