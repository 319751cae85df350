"""Sample order against its definition by one sort, in slices and in sets of one image."""

from itertools import pairwise

import numpy as np
import pytest

from mvlm_dataloading.loader.sampler import GROUP, RUN_LENGTH, SampleOrder
from mvlm_dataloading.randomness import Purpose, hash64


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
    if len(cuts) - 1 > GROUP:
        shards = np.arange(int(shard[-1]) + 1)
        rank = np.argsort(np.argsort(hash64(Purpose.SHARDS, seed, epoch, shards), kind="stable"))
        sort_keys.append(rank[shard[first]] // GROUP)
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
