"""Where a process stands among the processes of a run: ranks, devices, and the few small things they tell each other.

`torchrun` starts the processes and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without those
variables a process is a world of one and there is no process group.
"""

import json
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from mvlm.device import choose_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them. With `size` 1 nothing here communicates."""

    rank: int
    """0 to size - 1; rank 0 writes the files that there is one of."""
    size: int
    local_rank: int
    """The rank within this machine, which chooses the GPU."""
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The tensor, reduced over ranks in place. On the device, without waiting for it, where the tensor is there."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op)
        return tensor

    def start_all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> "dist.Work | None":
        """The same, begun: `wait()` on what is returned (None in a world of one) before reading the tensor."""
        return dist.all_reduce(tensor, op=op, async_op=True) if self.size > 1 else None

    def gather_objects(self, value: Any, group: "dist.ProcessGroup | None" = None) -> list[Any]:
        """Every rank's value, by rank, on every rank. Values are plain and travel as JSON, so nothing is unpickled."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=group)
        longest = max(int(length) for length in lengths)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def close(self) -> None:
        """Leave the process group. After an error it is left out: other ranks may be stuck in it."""
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the processes that torchrun started, or be a world of one. ConfigError where `device` is not here.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL; a collective that takes longer than the time-out raises.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(rank=0, size=1, local_rank=0, device=chosen)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(backend, store=_store_of_attempt(timeout), rank=rank, world_size=size, timeout=timeout)
    return World(rank=rank, size=size, local_rank=local_rank, device=chosen)


def _store_of_attempt(timeout: timedelta) -> PrefixStore | None:
    """Where the ranks of this attempt find each other, if torchrun keeps it; None where torch makes one for them.

    The torchrun of torch 2.13 gives every attempt the same store, in which the addresses of ranks that have ended still
    stand; so each attempt takes a corner of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if os.environ["RANK"] == "0" and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        log.warning(
            "torchrun cannot replace a node that is lost: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every "
            "node (docs/training.md)"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    return PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
