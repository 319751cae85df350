"""Times of collectives and of recorded steps, by hand."""

import math

import pytest

from mvlm.costs.recorded_step import MESSAGE, PROTOCOLS, Links, RecordedStep, rescaled, step_times
from mvlm.costs.recording import Collective, Event

CLUSTER = Links(per_node=8, nodes=16, intra_node=400e9, inter_node=50e9)
NODE = Links(per_node=8, nodes=1, intra_node=400e9, inter_node=50e9)
SIMPLE = PROTOCOLS[-1]


def gather(size: int, label: str = "embeddings") -> Collective:
    return Collective("all-gather", label, size, 128)


def test_large_gather_takes_the_time_of_its_slowest_link():
    """16 GB for each: 7 / 8 of it in a node, 127 / 128 through eight adapters of a node; 15 and 112 hops of a ring."""
    found = CLUSTER.seconds(gather(10**9 // 8))
    wanted = 16e9 * max(7 / 8 / 400e9, 127 / 128 / 400e9) + 8.4e-6 + 15 * 14e-6 + 112 * 3.4e-6
    assert found == pytest.approx(wanted)


def test_small_gather_takes_the_time_of_its_hops_in_the_fastest_protocol():
    assert CLUSTER.seconds(gather(8)) == pytest.approx(6.6e-6 + 15 * 2.7e-6 + 112 * 1.08e-6, rel=1e-3)


def test_reduction_takes_a_ring_or_a_tree():
    small = Collective("all-reduce", "losses and counts", 28, 128)
    tree = 6.6e-6 + 2 * (7 * 1.08e-6 + math.log2(16) * 5e-6)
    assert CLUSTER.seconds(small) == pytest.approx(tree, rel=1e-3)
    large = Collective("all-reduce", "gradients", 10**10, 8)
    assert NODE.seconds(large) == pytest.approx(2 * 1e10 * 7 / 8 / 400e9 + 8.4e-6 + 2 * 7 * 3.4e-6)


def test_all_to_all_takes_each_ranks_own_link_and_a_time_for_each_message():
    """Of 127 others 7 are in the node. What comes from the others enters through the rank's own adapter."""
    moved = Collective("all-to-all", "features", 128 * 10**6, 128, senders=80, own=10**6)
    wanted = SIMPLE.start + SIMPLE.ring[1] + 80 * MESSAGE + 127e6 * (120 / 127) / 50e9
    assert CLUSTER.seconds(moved) == pytest.approx(wanted)


def test_groups_across_nodes_have_one_rank_in_each():
    moved = Collective("all-reduce", "gradients", 10**9, 16, stride=8)
    assert CLUSTER.seconds(moved) == pytest.approx(2 * 1e9 * 15 / 16 / 50e9, rel=0.02)
    assert CLUSTER.seconds(Collective("all-reduce", "gradients", 10**9, 1, stride=8)) == 0


def record(events: list[Event], *collectives: Collective) -> RecordedStep:
    return RecordedStep(list(collectives), events, 100)


def test_hidden_collective_costs_nothing_and_a_late_one_what_is_left():
    """Computation of 1 s; the collective starts at 0.2 s and is waited for at 0.7 s."""
    for seconds, wanted in ((0.4, 0.0), (0.8, 0.3)):
        moved = gather(round(seconds * 400e9 / 128 * 128 / 127))
        step = record([Event("start", 20, False, 0), Event("wait", 70, False, 0)], moved)
        found = step_times(step, CLUSTER, 1.0)
        assert found.step == pytest.approx(1 + wanted, rel=2e-3)
        assert sum(found.waiting.values()) == pytest.approx(wanted, abs=2e-3)
        assert found.network["embeddings"] == pytest.approx(seconds, rel=2e-3)


def test_lane_waits_without_the_main_stream():
    """In the lane a gather, then an all-to-all after it; only the join makes the main stream wait, for both."""
    first = gather(round(0.3 * 400e9 / 128 * 128 / 127), "ids and draws")
    second = Collective("all-to-all", "features", round(0.5 * 50e9 * 127 / 120), 128)
    events = [
        Event("enter", 10),
        Event("start", 10, True, 0),
        Event("wait", 10, True, 0),
        Event("start", 10, True, 1),
        Event("wait", 60, True, 1),
        Event("join", 60),
    ]
    found = step_times(record(events, first, second), CLUSTER, 1.0)
    # They end at 0.1 + 0.3 + 0.5 s, and the main stream is at 0.6 s: it waits for the second.
    assert found.waiting == {"features": pytest.approx(0.3, abs=3e-3)}


def test_collectives_run_one_after_another_and_gradients_are_waited_for_at_the_end():
    half = Collective("all-reduce", "gradients", round(0.5 * 400e9 / 2 * 128 / 127), 128)
    events = [Event("start", 50, False, 0), Event("wait", 50, False, 0), Event("start", 60, False, 1)]
    found = step_times(record(events, half, half), CLUSTER, 1.0)
    assert found.step == pytest.approx(1.5, rel=2e-3)
    assert found.waiting == {"gradients": pytest.approx(0.5, rel=5e-3)}


def test_rescaled_parts_by_hand():
    moved = (
        Collective("all-to-all", "features", 1000, 16, senders=8, own=60),
        gather(500),
        Collective("reduce-scatter", "gradients", 7, 8),
        Collective("all-reduce", "gradients", 9, 2, stride=8),
    )
    moved = (moved[0], Collective("all-gather", "embeddings", 500, 16), *moved[2:])
    found = rescaled(record([], *moved), 64, 8, pairs=10, batch=0.5).collectives
    assert (found[0].size, found[0].own, found[0].ranks) == (500, 7, 64)
    assert found[0].senders == round(63 * (1 - (63 / 64) ** 5))
    assert (found[1].size, found[1].ranks, found[1].received) == (250, 64, 250 * 63)
    assert (found[2].size, found[2].ranks) == (7, 8)
    assert (found[3].size, found[3].ranks) == (9, 8)
