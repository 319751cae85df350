"""Order 2 against its definition by explicit loops: lanes, rounds, blocks, pools, and the bytes that ranks read."""

from dataclasses import replace
from itertools import groupby, pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from mvlm_dataloading.loader import lanes as lanes_module
from mvlm_dataloading.loader.lanes import LaneOrder, Lanes, choose_lanes
from mvlm_dataloading.randomness import Purpose, hash64

SEED = 3


def draw(purpose: Purpose, *values: int) -> int:
    return int(hash64(purpose, SEED, *values))


def by_loops(
    sizes: list[int],
    lanes: Lanes,
    count: int,
    sets: dict[int, int] | None = None,
    per_image: int = 1,
    groups: dict[int, list[int]] | None = None,
):
    """The first `count` places of order 2: (id, epoch) each, one by one, from the description of `LaneOrder`."""
    total, firsts = sum(sizes), [sum(sizes[:k]) for k in range(len(sizes))]
    block = max(1, min(lanes.block, total // lanes_module.POOL))
    piece = block * max(1, total // (lanes_module.PIECES * block))
    step = max(1, lanes_module.GROUP // lanes.count)
    own_blocks, pieces = dict[int, int](), list[range]()  # first sample of each sample's block
    for shard, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        of_shard = (groups or {}).get(shard) or [min(block, size - k) for k in range(0, size, block)]
        at, begins = first, list[int]()
        for length in of_shard:
            if not begins or (at - first) // piece != (begins[-1] - first) // piece:
                begins.append(at)
            own_blocks |= dict.fromkeys(range(at, at + length), at)
            at += length
        pieces += [range(a, b) for a, b in pairwise([*begins, at])]
    blocks = len(set(own_blocks.values()))
    pool = min(lanes_module.POOL, lanes_module.POOL * block * blocks // total) if groups else lanes_module.POOL
    pool = max(1, pool // lanes.count)
    found = []
    for epoch in range(count // total + 1):
        places = range(epoch * total, (epoch + 1) * total)
        lane_of = [p % (lanes.count * lanes.rows) // lanes.rows for p in places]
        permuted = sorted(pieces, key=lambda part: draw(Purpose.PIECES, epoch, part[0]))
        samples = [(number, part[0], i) for number, part in enumerate(permuted) for i in part]
        queues = []
        for lane in range(lanes.count):
            mine, samples = samples[: lane_of.count(lane)], samples[lane_of.count(lane) :]
            start, queue = mine[0][0] if mine else 0, []
            for _, group in groupby(mine, key=lambda sample: (sample[0] - start) // step):
                blocks = [list(part) for _, part in groupby(group, key=lambda s: (s[0], own_blocks[s[2]]))]
                blocks.sort(key=lambda part: draw(Purpose.BLOCKS, epoch, part[0][2]))
                keys = {}
                for rank, part in enumerate(blocks):
                    for _, _, i in part:
                        low = (draw(Purpose.MIX, epoch, i) >> 32) * pool
                        keys[i] = (rank << 32) * (len(blocks) > pool) + low
                ids = sorted(sorted(keys), key=keys.__getitem__)
                if sets is not None:
                    together: list[list[int]] = []
                    for i in ids:
                        own = [one for one in together if sets[one[0]] == sets[i] and len(one) < per_image]
                        own[0].append(i) if own else together.append([i])
                    ids = [i for one in together for i in one]
                queue += ids
            queues.append(iter(queue))
        found += [(next(queues[lane]), epoch) for lane in lane_of]
    return found[:count]


SHAPES: list[tuple[list[int], Lanes]] = [
    ([1], Lanes(1, 1, 5)),
    ([7], Lanes(4, 2, 3)),  # fewer samples than a round
    ([40, 1, 33], Lanes(8, 3, 4)),  # fewer shards than lanes
    ([0, 5, 0, 0, 20, 0], Lanes(2, 1, 2)),
    ([17] * 40, Lanes(4, 2, 5)),
    ([100, 3, 250, 1, 90], Lanes(6, 5, 7)),  # no round divides the epoch
    ([60] * 5, Lanes(64, 1, 2)),
]


@pytest.fixture
def few(monkeypatch):
    """Small pools and groups, so that small splits have several."""
    for name, value in {"POOL": 24, "PIECES": 10, "GROUP": 12}.items():
        monkeypatch.setattr(lanes_module, name, value)


@pytest.mark.parametrize("sizes, lanes", SHAPES)
@pytest.mark.parametrize("small", [True, False])
def test_the_order_is_its_definition(sizes, lanes, small, request):
    if small:
        request.getfixturevalue("few")
    count = 3 * sum(sizes) + 5
    ids, epochs = LaneOrder(np.array(sizes), SEED, lanes).at(np.arange(count))
    assert list(zip(ids.tolist(), epochs.tolist(), strict=True)) == by_loops(sizes, lanes, count)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(sum(sizes)))
    some = np.random.default_rng(0).integers(0, count, 50)
    assert LaneOrder(np.array(sizes), SEED, lanes).at(some)[0].tolist() == ids[some].tolist()


TABLES: list[tuple[list[int], dict[int, list[int]], Lanes]] = [
    ([7], {0: [7]}, Lanes(4, 2, 3)),  # one row group
    ([40, 0, 33], {0: [9, 1, 30], 2: [11] * 3}, Lanes(8, 3, 4)),
    ([100] * 9, {k: [30, 30, 30, 10] for k in range(0, 9, 2)}, Lanes(4, 2, 5)),  # tars between tables
    ([300, 200], {0: [3] * 100, 1: [20] * 10}, Lanes(6, 5, 7)),
]


@pytest.mark.parametrize("sizes, groups, lanes", TABLES)
@pytest.mark.parametrize("small", [True, False])
def test_row_groups_are_blocks(sizes, groups, lanes, small, request):
    if small:
        request.getfixturevalue("few")
    total = sum(sizes)
    order = LaneOrder(np.array(sizes), SEED, lanes, groups={shard: np.array(own) for shard, own in groups.items()})
    ids, epochs = order.at(np.arange(3 * total))
    assert list(zip(ids.tolist(), epochs.tolist(), strict=True)) == by_loops(sizes, lanes, 3 * total, groups=groups)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == list(range(total))
    ends = {shard: sum(sizes[:shard]) + np.cumsum(own) for shard, own in groups.items()}
    for position in range(total, 2 * total):
        own, places = order.block_of(position)
        assert position in places
        assert ids[places].tolist() == own.tolist()
        shard = int(np.searchsorted(np.cumsum(sizes), own[0], side="right"))
        if shard in groups:
            assert len(set(np.searchsorted(ends[shard], own, side="right").tolist())) == 1


@pytest.mark.parametrize("per_image", [2, 3])
def test_samples_of_an_image_stay_together_within_a_group(few, per_image):
    sizes, lanes = [60, 31, 80], Lanes(2, 6, 10)
    images = np.arange(sum(sizes)) // 5  # five questions of each image, some of them across shards
    order = LaneOrder(np.array(sizes), SEED, lanes, images=images, per_image=per_image)
    wanted = by_loops(sizes, lanes, 2 * sum(sizes), dict(enumerate(images.tolist())), per_image)
    assert order.at(np.arange(2 * sum(sizes)))[0].tolist() == [i for i, _ in wanted]


def blocks_of(order: LaneOrder, sizes: list[int], positions: np.ndarray) -> set[tuple[int, int, int]]:
    """Epoch, shard and block of the samples at some positions."""
    ids, epochs = order.at(positions)
    first = np.append(0, np.cumsum(sizes))
    shard = np.searchsorted(first[1:], ids, side="right")
    return set(zip(epochs.tolist(), shard.tolist(), ((ids - first[shard]) // order.block).tolist(), strict=True))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_ranks_together_read_each_block_once_an_epoch(ranks, microbatches):
    """Ranks and microbatches that divide the lanes, over three epochs that no batch divides. Lanes cut 31 blocks."""
    sizes, batch = [1000] * 64 + [317], 64
    lanes = Lanes(32, batch // 32, 100)
    order = LaneOrder(np.array(sizes), SEED, lanes)
    part = batch // microbatches
    positions = np.arange(3 * sum(sizes) // batch * batch).reshape(-1, ranks, part // ranks)
    read = [blocks_of(order, sizes, positions[:, rank].ravel()) for rank in range(ranks)]
    total = sum(map(len, read))
    assert len(set.union(*read)) <= total <= len(set.union(*read)) + 3 * 31
    assert {len(ids) for ids in ([order.at(positions[0, rank])[0] for rank in range(ranks)])} == {part // ranks}


def test_a_lane_has_few_blocks_open_at_a_time():
    """About POOL of all lanes together, so that they fit into memory."""
    sizes = [4000] * 100
    order = LaneOrder(np.array(sizes), SEED, Lanes(16, 4, 50))
    positions = np.arange(sum(sizes))
    ids, _ = order.at(positions)
    block = ids // 50
    first, last = np.full(block.max() + 1, len(ids)), np.zeros(block.max() + 1, int)
    np.minimum.at(first, block, positions)
    np.maximum.at(last, block, positions)
    opened, closed = np.sort(first), np.sort(last)
    open_blocks = [np.searchsorted(opened, p, side="right") - np.searchsorted(closed, p) for p in positions[::997]]
    assert max(open_blocks) < 1.1 * lanes_module.POOL


@pytest.mark.parametrize("sizes, lanes", SHAPES)
def test_a_block_has_the_ids_and_positions_of_its_samples(few, sizes, lanes):
    order, total = LaneOrder(np.array(sizes), SEED, lanes), sum(sizes)
    ids, _ = order.at(np.arange(3 * total))
    first = np.append(0, np.cumsum(sizes))
    for position in range(total, 2 * total):
        own, places = order.block_of(position)
        assert position in places
        assert ids[places].tolist() == own.tolist()
        shard = np.searchsorted(first[1:], own, side="right")
        assert len({*zip(shard.tolist(), ((own - first[shard]) // order.block).tolist(), strict=True)}) == 1
        for other in places.tolist():
            assert sorted(order.block_of(other)[1].tolist()) == sorted(places.tolist())


@pytest.mark.parametrize(
    "parts, round_size, per_image, lanes",
    [(1, 512, 1, (64, 8)), (2, 96, 1, (32, 3)), (48, 96, 1, (96, 1)), (1, 7, 1, (1, 1)), (4, 128, 4, (32, 4)),
     (1, 10, 4, (1, 1)), (3, 576, 1, (192, 3)), (128, 512, 1, (128, 4))],
)  # fmt: skip
def test_lanes_divide_a_step_and_ranks_divide_lanes(waves_train, parts, round_size, per_image, lanes):
    linked = replace(waves_train, links=SimpleNamespace())
    found = choose_lanes(linked, parts, round_size, per_image)
    assert found is not None
    assert found[:2] == lanes
    mean = sum(shard["bytes"] for shard in waves_train.shards) / len(waves_train)
    assert found.block == round(2e6 / mean)
    assert choose_lanes(waves_train, parts, round_size, per_image) is None


@pytest.mark.parametrize(
    "groups, group_bytes, parts, lanes",
    [(5000, 10**6, 1, 64), (200, 10**6, 1, 4), (200, 10**6, 3, 12), (9, 10**6, 1, 1), (5000, 10**8, 1, 16),
     (5000, 10**8, 32, 32)],
)  # fmt: skip
def test_row_groups_have_fewer_lanes_if_they_are_few_or_large(waves_train, groups, group_bytes, parts, lanes):
    """So that few are cut by the ends of lanes, and a block of each lane fits into memory."""
    shard = {"samples": 100 * groups, "bytes": groups * group_bytes, "groups": [100] * groups}
    description = {"splits": {"train": {"shards": [shard]}}}
    index = SimpleNamespace(first=np.array([0, 100 * groups]))
    table = replace(
        waves_train, links=SimpleNamespace(), description=description, index=index, start=0, stop=100 * groups
    )
    found = choose_lanes(table, parts, 3 * 512, 1)
    assert found is not None
    assert found.count == lanes
