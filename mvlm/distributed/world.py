"""Ranks of a run, their devices, and small collectives.

`torchrun` starts the ranks and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without these variables
a process is a world of one, without a process group.
"""

import json
import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from mvlm.device import choose_device
from mvlm.distributed.collectives import Nodes

log = logging.getLogger(__name__)
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class World:
    """All ranks of a run, seen from one of them. With `size` 1 nothing here communicates."""

    rank: int
    """0 to size - 1. Rank 0 writes the files that exist once for the whole run."""
    size: int
    local_rank: int
    """Rank within this node, which selects the GPU."""
    device: torch.device
    nodes: Nodes | None = None
    """Groups of ranks for gathers in two steps, where several nodes have as many ranks, several each; else None."""

    @property
    def first(self) -> bool:
        """True for rank 0."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor over ranks in place and return it. A tensor on a GPU is reduced there, without a sync."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def gather_objects(self, value: Any, group: "dist.ProcessGroup | None" = None) -> list[Any]:
        """Return every rank's value, by rank, on every rank. Values are sent as JSON, so nothing is unpickled."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=group)
        longest = max(int(length) for length in lengths)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def send_text(self, text: str) -> str:
        """Return rank 0's text on every rank. The others' are ignored."""
        if self.size == 1:
            return text
        content = text.encode() if self.first else b""
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        sent = torch.empty(int(length), dtype=torch.uint8)
        sent[: len(content)] = torch.tensor(bytearray(content), dtype=torch.uint8)
        dist.broadcast(sent, 0)
        return sent.numpy().tobytes().decode()

    def close(self) -> None:
        """Leave the process group.

        NOTE: do not call it after an error. It would wait, perhaps for ever, for ranks that are stuck.
        """
        if self.size > 1:
            dist.destroy_process_group()


def join_ranks(device: str = "auto") -> World:
    """Join the ranks that torchrun started, or return a world of one. ConfigError if this machine has no such device.

    Gloo carries tensors on the CPU, NCCL those on a GPU. A collective that takes longer than `TIMEOUT` raises.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":  # with its number, which torch.cuda.set_device needs
        chosen = torch.device("cuda", torch.cuda.current_device())
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(rank=0, size=1, local_rank=0, device=chosen)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt_store(), rank=rank, world_size=size, timeout=TIMEOUT)
    world = World(rank=rank, size=size, local_rank=local_rank, device=chosen)
    each = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # Ranks that see other nodes would wait for each other.
    if all(found == [each, True] for found in world.gather_objects([each, rank % each == local_rank])):
        world = replace(world, nodes=nodes_of(world, each, "nccl" if chosen.type == "cuda" else "gloo"))
    return world


def nodes_of(world: World, each: int, backend: str) -> Nodes | None:
    """Make the groups of a rank where each node has so many ranks, one after another. None if one step does as well."""
    number, node = world.size // each, world.rank // each
    if world.size % each or number == 1 or each == 1:
        return None
    within, across = range(node * each, (node + 1) * each), range(world.rank % each, world.size, each)

    def group_of(ranks: range) -> dist.ProcessGroup:
        group = dist.new_group([*ranks], timeout=TIMEOUT, backend=backend, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)  # torch returns a number to ranks outside the group alone
        return group

    return Nodes(number, within=group_of(within), across=group_of(across))


def attempt_store() -> PrefixStore | None:
    """Store in which the ranks of one attempt of torchrun find each other; None if torch makes one for them.

    torchrun (torch 2.13) gives every attempt the same store, which still has the addresses of ranks that have ended.
    Each attempt therefore uses its own prefix.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if os.environ["RANK"] == "0" and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        log.warning(
            "torchrun cannot replace a node that is lost: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every "
            "node (docs/guides/many_gpus.md)"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=TIMEOUT)  # pyright: ignore[reportPrivateImportUsage]
    return PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
