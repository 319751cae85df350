"""The exchange at the end of a step, among two and four ranks with Gloo."""

import json
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mvlm.distributed import world as distributed
from mvlm.distributed.step_exchange import StepExchange
from support.faults.forks import ended_well, in_ranks
from support.models import ALONE

STEPS = 6


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_tell_each_other_all_of_a_step_in_one_collective(tmp_path, size):
    """The last rank requests at steps 2 and 3, as its request has no effect yet at 3; its update of step 4 is bad."""

    def work() -> None:
        world = distributed.join_ranks("cpu")
        exchange, last = StepExchange(world, requests=2), world.rank == size - 1
        found = []
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            for step in range(1, 1 + STEPS):
                own = torch.tensor(not (last and step == 4))
                good, figures = exchange.send(own, (last and step in (2, 3), False), (world.rank, 10.0 * step))
                assert figures is not None
                found.append([good.item(), exchange.granted((True, True)), figures.tolist()])
        (tmp_path / str(world.rank)).write_text(json.dumps([found, reduced.call_count]))
        world.close()

    assert all(ended_well(pid) for pid in in_ranks(work, size))
    for rank in range(size):
        found, collectives = json.loads((tmp_path / str(rank)).read_text())
        good, granted, figures = zip(*found, strict=True)
        assert good == (True, True, True, False, True, True)
        assert granted == ([False, False], [False, False], [True, False], *([[False, False]] * 3))
        assert figures == tuple([[float(i), 10.0 * step] for i in range(size)] for step in range(1, 1 + STEPS))
        assert collectives == STEPS


def test_one_rank_has_its_requests_at_once():
    exchange, good = StepExchange(ALONE, requests=2), torch.tensor(True)
    assert exchange.send(good, (False, False), (1.0,)) == (good, None)
    assert exchange.granted((True, False)) == [True, False]
