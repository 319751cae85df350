"""Decisions that all ranks of a run take together: to start, to save, to stop, to give up."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.config.json_files import differing_settings
from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm_dataloading import DataError, Dataset

T = TypeVar("T")
USER_ERRORS = (ConfigError, RunError, DataError)


def run_on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Do `work` on every rank. If it fails on any, all of them end: rank 0 with the error, the others with code 2."""
    try:
        result, error = work(), None
    except Exception as caught:
        result, error = None, caught
    told = world.gather_objects(None if error is None else str(error))
    if error is not None and (world.first or not isinstance(error, USER_ERRORS)):
        raise error
    failed = [rank for rank, message in enumerate(told) if message is not None]
    if failed and world.first:
        raise RunError(f"rank {failed[0]}: {told[failed[0]]}")
    if failed:
        raise SystemExit(2)
    return result  # pyright: ignore[reportReturnType]


def check_ranks(world: World, config: PretrainConfig, dataset: Dataset) -> None:
    """RunError on rank 0, and the end of the others, where a rank has other settings or data than rank 0."""
    everyone = world.gather_objects({"settings": config.to_dict(), "out": str(config.out), "data": dataset.fingerprint})

    def compare() -> None:
        for rank, its in enumerate(everyone):
            differing = differing_settings(everyone[0]["settings"], its["settings"])
            for name in ("out", "data"):
                if its[name] != everyone[0][name]:
                    differing.append(f"{name}: there {everyone[0][name]}, here {its[name]}")
            if differing and world.first:
                raise RunError(
                    f"rank {rank} was started with other settings or data than rank 0 "
                    f"({'; '.join(differing).replace('there', 'rank 0').replace('here', f'rank {rank}')}); "
                    f"start all ranks with the same command on the same data"
                )

    run_on_all_ranks(world, compare)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. NCCL and the store have classes for it, gloo words."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


class StepDecisions:
    """Requests of any rank, on which all ranks act after the same step: to save, to evaluate, to stop.

    Requests are all-reduced while the next step runs and take effect after it, so no step waits.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: tuple[Tensor, dist.Work | None] | None = None
        self._decided: list[bool] = []

    def decide(self, *requests: bool) -> list[bool]:
        """The decision on each request: in a world of one, the request itself; else what any rank requested last call.

        A request that took effect last call is dropped once: it was sent before the rank could see its effect.
        """
        if self._world.size == 1:
            return list(requests)
        before = self._sent
        mine = torch.tensor(requests, dtype=torch.int32)
        self._sent = (mine, self._world.start_all_reduce(mine, dist.ReduceOp.MAX))
        if before is None:
            return [False] * len(requests)
        received = self._receive(before)
        last = self._decided or [False] * len(received)
        self._decided = [new and not old for new, old in zip(received, last, strict=True)]
        return self._decided

    def close(self) -> None:
        """Wait for the requests under way. Call it before the process group is closed."""
        if self._sent is not None:
            self._receive(self._sent)

    @staticmethod
    def _receive(sent: "tuple[Tensor, dist.Work | None]") -> list[bool]:
        values, work = sent
        if work is not None:
            work.wait()
        return values.bool().tolist()
