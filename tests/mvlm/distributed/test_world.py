"""World: one process here, and two processes for the collectives."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from mvlm.distributed import world as distributed
from support.faults.forks import ended_well, in_ranks


def test_two_ranks_reduce_and_gather(tmp_path):
    def work() -> None:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
        world = distributed.join_ranks("cpu")
        found = {
            "rank": [world.rank, world.size, world.local_rank, world.first, str(world.device)],
            "sum": world.all_reduce(torch.tensor([1.0 + world.rank, 5.0])).tolist(),
            "max": world.all_reduce(torch.tensor([world.rank]), dist.ReduceOp.MAX).tolist(),
            "gather": world.gather_objects({"long": "é" * (1 + 3 * world.rank), "rank": world.rank}),
            "sent": world.send_text("é" * 3 if world.first else "other"),
        }
        (tmp_path / str(world.rank)).write_text(json.dumps(found))
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, 2)] == [True, True]
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == {
            "rank": [rank, 2, rank, rank == 0, "cpu"],
            "sum": [3.0, 10.0],
            "max": [1],
            "gather": [{"long": "é", "rank": 0}, {"long": "éééé", "rank": 1}],
            "sent": "ééé",
        }


@pytest.mark.parametrize("nodes", [1, 2])
def test_attempt_does_not_see_the_store_of_the_attempt_before(monkeypatch, caplog, nodes):
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_WORLD_SIZE": str(nodes),
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(kept.port),
    }.items():
        monkeypatch.setenv(name, value)
    seen = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        for _ in range(2):  # two ranks
            store = distributed.attempt_store()
            assert store is not None
            seen.append(store.add("arrived", 1))
    assert seen == [1, 2, 1, 2]
    assert ("cannot replace a node that is lost" in caplog.text) == (nodes > 1)
