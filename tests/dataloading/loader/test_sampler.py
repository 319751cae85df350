import time

import numpy as np
import pytest

from mvlm_dataloading.errors import need
from mvlm_dataloading.loader import sampler
from mvlm_dataloading.loader.sampler import (
    GROUP,
    RUN_LENGTH,
    SampleOrder,
    epoch_order,
    substitute_sample,
    write_index_views,
)
from mvlm_dataloading.randomness import Purpose, hash64
from support.data import make_captions


def shards_of(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("sizes", [(1,), (7,), (100,), (40, 1, 33), (RUN_LENGTH, 3 * RUN_LENGTH, 5)])
def test_sample_order_has_every_sample_once_per_epoch(sizes):
    shard = shards_of(*sizes)
    orders = [epoch_order(3, epoch, shard) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(shard)))
    if len(shard) > 20:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], epoch_order(4, 0, shard))


def test_shards_are_mixed_in_runs():
    shard = shards_of(400, 160, 240)
    order = epoch_order(0, 0, shard)
    runs = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1)
    assert len(runs) > 20
    assert all(len(run) % RUN_LENGTH == 0 for run in runs)
    # Within a shard the order is not the stored one.
    inside = order[shard[order] == 0]
    assert np.abs(np.corrcoef(inside, np.arange(400))[0, 1]) < 0.2


def test_many_shards_are_mixed_in_groups():
    shard = shards_of(*[50 + k % 3 for k in range(3 * GROUP + 5)])
    order = epoch_order(1, 0, shard)
    assert sorted(order.tolist()) == list(range(len(shard)))
    groups = []
    for i in order:
        if not groups or shard[i] not in groups[-1]:
            if not groups or len(groups[-1]) == GROUP:
                groups.append(set())
            groups[-1].add(int(shard[i]))
    assert [len(group) for group in groups] == [GROUP, GROUP, GROUP, 5]
    assert set.union(*groups) == set(range(3 * GROUP + 5))
    assert groups[0] != set(range(GROUP))
    assert not np.array_equal(order, epoch_order(1, 1, shard))
    assert len(np.unique(shard[order[:200]])) > 8  # mixed within the group


def test_sample_order_is_the_documented_one(monkeypatch):
    """An oracle with Python's sort, for three shards in groups of two."""
    monkeypatch.setattr(sampler, "GROUP", 2)
    shard = shards_of(37, 20, 50)
    key = lambda purpose, i: int(hash64(purpose, 7, 2, i))  # noqa: E731
    runs = []
    for s in range(3):
        inside = sorted(np.flatnonzero(shard == s).tolist(), key=lambda i: key(Purpose.ORDER, i))
        runs += [inside[k : k + RUN_LENGTH] for k in range(0, len(inside), RUN_LENGTH)]
    turn = sorted(range(3), key=lambda s: key(Purpose.SHARDS, s))
    runs.sort(key=lambda run: (turn.index(int(shard[run[0]])) // 2, key(Purpose.RUNS, run[0])))
    assert epoch_order(7, 2, shard).tolist() == [i for run in runs for i in run]


def test_a_million_samples_are_ordered_at_once():
    shard = np.repeat(np.arange(200), 5000)
    started = time.process_time()
    order = epoch_order(0, 0, shard)
    assert time.process_time() - started < 1.5  # a quarter of a second on a quiet machine
    assert np.bincount(order, minlength=10**6).max() == 1


def test_with_one_shard_every_order_is_equally_likely():
    orders = np.array([epoch_order(0, epoch, shards_of(4)) for epoch in range(2400)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: mean 23, standard deviation 6.8; bounds at four of them.
    assert ((counts - 100) ** 2 / 100).sum() < 51


@pytest.mark.parametrize("shuffle", [True, False])
def test_sample_order_does_not_depend_on_the_slices(shuffle):
    shard = shards_of(20, 13)
    ids, epochs = SampleOrder(shard, 5, shuffle=shuffle)(0, 4 * 33)
    assert epochs.tolist() == [e for e in range(4) for _ in range(33)]
    for e in range(4):
        assert sorted(ids[epochs == e].tolist()) == list(range(33))
    if not shuffle:
        assert ids[:33].tolist() == list(range(33))
    for begin, count in ((0, 1), (30, 7), (32, 70), (66, 33), (99, 33)):
        piece = SampleOrder(shard, 5, shuffle=shuffle)(begin, count)
        assert np.array_equal(piece[0], ids[begin : begin + count])
        assert np.array_equal(piece[1], epochs[begin : begin + count])


def test_a_substitute_is_good_and_depends_only_on_the_bad_sample():
    assert substitute_sample(0, 1, 5, 100, {5}) == substitute_sample(
        0, 1, 5, 100, {5, 6, 7} - {substitute_sample(0, 1, 5, 100, {5})}
    )
    first = substitute_sample(0, 1, 5, 100, set())
    second = substitute_sample(0, 1, 5, 100, {first})
    assert first != second
    assert substitute_sample(0, 1, 5, 100, {second}) == first
    assert substitute_sample(0, 0, 0, 3, {0, 2}) == 1
    assert len({substitute_sample(s, e, i, 10**9, set()) for s in (0, 1) for e in (0, 1) for i in (0, 1)}) == 8


def test_dali_delivers_an_index_view_in_its_order_with_repetitions(tmp_path, train_split):
    """The loader relies on this, and DALI's documentation does not promise it."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(len(train_split)), rng.integers(0, len(train_split), 37), [3, 3, 3]])
    tars, indices = write_index_views(tmp_path, train_split, ids)
    assert len(tars) > 50  # the same few tars again and again
    fn, Pipeline = need("nvidia.dali.fn"), need("nvidia.dali.pipeline").Pipeline
    pipeline = Pipeline(batch_size=10, num_threads=1, device_id=None)
    with pipeline:
        text, metadata = fn.readers.webdataset(paths=tars, index_paths=indices, ext=["txt", "json"])
        pipeline.set_outputs(text, metadata)
    pipeline.build()
    for index in indices:
        (tmp_path / index).unlink()  # a built reader has read its indices
    for begin in range(0, len(ids), 10):
        text, metadata = pipeline.run()
        for row, i in enumerate(ids[begin : begin + 10]):
            assert text.at(row).tobytes().decode().splitlines() == make_captions(int(i))
            assert metadata.at(row).tobytes() == b'{"number":%d}' % i
