"""How the ranks of a run decide together: to begin, to save, to stop, to give up."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm.runs.folder import differing_settings
from mvlm_dataloading import DataError, Dataset

T = TypeVar("T")
USER_ERRORS = (ConfigError, RunError, DataError)


def agree(world: World, work: Callable[[], T]) -> T:
    """Do `work` on every rank. If it fails on any, all of them leave: rank 0 with the error, the others with code 2."""
    try:
        result, error = work(), None
    except Exception as caught:
        result, error = None, caught
    told = world.gather(None if error is None else str(error))
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
    everyone = world.gather({"settings": config.to_dict(), "out": str(config.out), "data": dataset.fingerprint})

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

    agree(world, compare)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. NCCL and the store have classes for it, gloo words."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


class Wishes:
    """Decisions that all ranks have to take after the same step, though one rank's clock or signal asks for them.

    Each rank's wishes are told to all while the next step runs, and are granted after that one, so that no step waits.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._told: tuple[Tensor, dist.Work | None] | None = None
        self._granted: list[bool] = []

    def grant(self, *wishes: bool) -> list[bool]:
        """What is granted now, by wish: in a world of one these; else what any rank wished at the call before.

        What was granted at the call before is not granted again: the wish was told before it came true.
        """
        if self._world.size == 1:
            return list(wishes)
        before = self._told
        mine = torch.tensor(wishes, dtype=torch.int32)
        self._told = (mine, self._world.start_all_reduce(mine, dist.ReduceOp.MAX))
        if before is None:
            return [False] * len(wishes)
        heard = self._hear(before)
        self._granted = [w and not g for w, g in zip(heard, self._granted or [False] * len(heard), strict=True)]
        return self._granted

    def close(self) -> None:
        """Hear out what is under way, before the ranks part."""
        if self._told is not None:
            self._hear(self._told)

    @staticmethod
    def _hear(told: "tuple[Tensor, dist.Work | None]") -> list[bool]:
        values, work = told
        if work is not None:
            work.wait()
        return values.bool().tolist()
