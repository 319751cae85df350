"""The exchange that ends every step: one all-reduce on the device for all that ranks tell each other about a step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mvlm.distributed.collectives import HostNumbers
from mvlm.distributed.world import World


class StepExchange:
    """The all-reduce that ends a step: it exchanges whether the update is good, requests of ranks, and their figures.

    It takes the maximum over ranks of one vector on the device: a flag for a bad update, a flag for each request, and
    the figures, for which each rank has places of its own. Requests take effect one step later: they are read once the
    next step is queued, so the device never waits for the host.

    Args:
        requests: number of kinds of requests that a rank may make.
    """

    def __init__(self, world: World, requests: int) -> None:
        self._world, self._requests = world, requests
        self._sent: HostNumbers | None = None
        self._before: HostNumbers | None = None
        self._granted = [False] * requests

    def send(self, good: Tensor, requests: Sequence[bool], figures: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Exchange a step's values with the other ranks, without waiting for the device.

        Args:
            good: bool (), on the device; False if this rank's update must not be made.
            requests: this rank's, one bool for each kind.
            figures: F numbers of this rank, at least 0.

        Returns:
            bool (), True if the update is good on all ranks; and the figures of all W ranks, float32 (W, F) on the
                device, or None in a world of one.
        """
        world, flags = self._world, 1 + self._requests
        if world.size == 1:
            return good, None
        # Pinned, and a new one each step: the copy to the device may be made long after this returns.
        own = torch.zeros(flags - 1 + world.size * len(figures), pin_memory=good.is_cuda)
        own[: flags - 1] = torch.tensor(requests, dtype=torch.float32)
        place = flags - 1 + world.rank * len(figures)
        own[place : place + len(figures)] = torch.tensor(figures, dtype=torch.float32)
        both = torch.cat([(~good).float()[None], own.to(good.device, non_blocking=True)])
        largest = world.all_reduce(both, dist.ReduceOp.MAX)
        self._before, self._sent = self._sent, HostNumbers(largest[1:flags])
        return largest[0] == 0, largest[flags:].view(world.size, len(figures))

    def granted(self, now: Sequence[bool]) -> list[bool]:
        """Requests that any rank sent at the step before the last one; in a world of one, those of `now`.

        A rank repeats a request in the step that grants it, before it can see the effect; the repetition is ignored.
        """
        if self._world.size == 1:
            return list(now)
        sent = [False] * self._requests if self._before is None else [value > 0 for value in self._before.read()]
        self._granted = [new and not old for new, old in zip(sent, self._granted, strict=True)]
        return self._granted
