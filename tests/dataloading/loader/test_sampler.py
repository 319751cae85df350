import shutil
import time
from itertools import pairwise

import numpy as np
import pytest

from mvlm_dataloading.errors import need
from mvlm_dataloading.loader import sampler
from mvlm_dataloading.loader.sampler import (
    GROUP,
    RUN_LENGTH,
    SampleOrder,
    index_folder,
    substitute_sample,
    write_index_views,
)
from mvlm_dataloading.randomness import Purpose, hash64
from support.data import make_captions


def shards_of(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def epoch_order(seed: int, epoch: int, shard: np.ndarray) -> np.ndarray:
    """The order of one epoch, for the shard of each sample."""
    order = SampleOrder(np.bincount(shard), seed, shuffle=True)
    return order(epoch * len(shard), len(shard))[0]


def order_by_one_sort(seed: int, epoch: int, shard: np.ndarray) -> np.ndarray:
    """The order of version 1 as its first implementation computed it: by one sort of all runs of the split."""
    keys = hash64(Purpose.ORDER, seed, epoch, np.arange(len(shard)))
    cuts = np.flatnonzero(np.diff(shard, prepend=-1, append=-1))
    ids = np.concatenate([begin + np.argsort(keys[begin:end], kind="stable") for begin, end in pairwise(cuts)])
    run_begin = np.concatenate([np.arange(begin, end, RUN_LENGTH) for begin, end in pairwise(cuts)])
    first = ids[run_begin]
    sort_keys = [first, hash64(Purpose.RUNS, seed, epoch, first)]
    if len(cuts) - 1 > sampler.GROUP:
        shards = np.arange(int(shard[-1]) + 1)
        rank = np.argsort(np.argsort(hash64(Purpose.SHARDS, seed, epoch, shards), kind="stable"))
        sort_keys.append(rank[shard[first]] // sampler.GROUP)
    runs = np.split(ids, run_begin[1:])
    return np.concatenate([runs[k] for k in np.lexsort(sort_keys)])


@pytest.mark.parametrize(
    "sizes",
    [
        (1,), (7,), (0, 5, 0, 0, 20, 0), (40, 1, 33), tuple(range(GROUP)), tuple(range(GROUP + 1)),
        tuple(range(GROUP + 2)), (*range(100, 40, -1), 0, 0), (17,) * 500,
    ],
)  # fmt: skip
def test_order_by_groups_is_the_order_by_one_sort(sizes):
    """Runs that began with one sort go on in the same order."""
    shard = shards_of(*sizes)
    for seed, epoch in ((0, 0), (3, 1), (2**40, 17)):
        assert np.array_equal(epoch_order(seed, epoch, shard), order_by_one_sort(seed, epoch, shard))


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


@pytest.mark.parametrize("sizes", [(100,), (60, 1, 0, 33)])
@pytest.mark.parametrize("per_image", [2, 3, 20])
def test_samples_of_an_image_come_in_sets(sizes, per_image):
    """Each image's samples are in as few sets as possible, the sets are shuffled, and so are the samples in them."""
    shard = shards_of(*sizes)
    within = np.arange(len(shard)) - np.concatenate([[0], np.cumsum(sizes)])[shard]
    images = np.unique(np.stack([shard, within % 9]), axis=1, return_inverse=True)[1].reshape(-1)
    order = SampleOrder(np.bincount(shard), 3, shuffle=True, images=images, per_image=per_image)
    epochs = [order(epoch * len(shard), len(shard))[0] for epoch in range(2)]
    assert not np.array_equal(epochs[0], epochs[1])
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(len(shard)))
        sets: dict[int, list[int]] = {}
        starts = []
        while len(ids):
            same = int(np.argmax(np.append(images[ids], -1) != images[ids[0]]))  # samples of one image from here on
            own = sets.setdefault(int(images[ids[0]]), [])
            left = int((images == images[ids[0]]).sum()) - sum(own)
            taken = min(same, per_image, left)
            assert taken in (per_image, (left + sum(own)) % per_image)
            own.append(taken)
            starts.append(int(ids[0]))
            ids = ids[taken:]
        assert all(len(own) == -(-int((images == image).sum()) // per_image) for image, own in sets.items())
        assert starts != sorted(starts)
    assert np.array_equal(order(7, 50)[0], np.concatenate([order(7, 13)[0], order(20, 37)[0]]))


def million_in_slices(sizes: np.ndarray) -> np.ndarray:
    """An epoch of a million samples, read in slices of odd lengths as segments of several sizes read it."""
    order, parts, at = SampleOrder(sizes, 11, shuffle=True), [], 0
    for count in (1, 1023, *[16384] * 60, 9999, 5937):
        parts.append(order(at, count)[0])
        at += count
    assert at == 10**6
    return np.concatenate(parts)


@pytest.mark.slow
def test_each_of_a_million_samples_comes_once_in_an_epoch_and_shards_are_as_mixed_as_by_one_sort():
    """The order by one sort is the same, so this holds it to a mixture that a change of version would have to keep."""
    more = np.random.default_rng(0).integers(0, 3000, 100)
    sizes = 5000 + np.concatenate([more, -more])
    shard = np.repeat(np.arange(200), sizes)
    order = million_in_slices(sizes)
    assert np.bincount(order, minlength=10**6).tolist() == [1] * 10**6
    mixed, wanted = (distinct_shards(shard[one]) for one in (order, order_by_one_sort(11, 0, shard)))
    assert mixed == wanted
    # 256 samples are 16 runs, of 32 shards: 32 (1 - (31/32)^16) = 12.7 if the runs are drawn at random; one more from
    # the part of a run at each end.
    assert 11.5 < mixed < 14.5


def distinct_shards(shard: np.ndarray, batch: int = 256) -> float:
    """Mean number of shards in a batch."""
    batches = np.sort(shard[: len(shard) // batch * batch].reshape(-1, batch), axis=1)
    return float((np.diff(batches, axis=1) != 0).sum(axis=1).mean() + 1)


def test_only_the_groups_that_are_reached_are_ordered():
    """The first slice of a hundred million samples in 10,000 shards takes a group's time, not that of the split."""
    order = SampleOrder(np.full(10_000, 10_000), 0, shuffle=True)
    started = time.process_time()
    ids, _ = order(0, 1024)
    last, _ = order(10**8 - 5, 5)
    assert time.process_time() - started < 1.5  # a tenth of a second on a quiet machine
    assert len(np.unique(ids // 10_000)) <= GROUP
    assert len({*ids.tolist(), *last.tolist()}) == 1029


@pytest.mark.slow
def test_with_one_shard_every_order_is_equally_likely():
    orders = np.array([epoch_order(0, epoch, shards_of(4)) for epoch in range(2400)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: mean 23, standard deviation 6.8; bounds at four of them.
    assert ((counts - 100) ** 2 / 100).sum() < 51


@pytest.mark.parametrize("shuffle", [True, False])
def test_sample_order_does_not_depend_on_the_slices(shuffle):
    sizes = np.array([20, 13])
    ids, epochs = SampleOrder(sizes, 5, shuffle=shuffle)(0, 4 * 33)
    assert epochs.tolist() == [e for e in range(4) for _ in range(33)]
    for e in range(4):
        assert sorted(ids[epochs == e].tolist()) == list(range(33))
    if not shuffle:
        assert ids[:33].tolist() == list(range(33))
    for begin, count in ((0, 1), (30, 7), (32, 70), (66, 33), (99, 33)):
        piece = SampleOrder(sizes, 5, shuffle=shuffle)(begin, count)
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


def test_index_views_are_written_to_memory_where_there_is_room(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: True)
    for free, wanted in ((1 << 30, "/dev/shm"), (1 << 20, None)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        assert index_folder() == wanted

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("shutil.disk_usage", missing)
    assert index_folder() is None
