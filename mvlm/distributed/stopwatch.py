"""Time that a rank computes by itself in a step, before it waits for others."""

import time
from collections import deque

import torch


class Stopwatch:
    """Seconds from the start of a step to the end of its first forward pass through the encoders.

    All ranks end a step together, so a whole step takes equally long on each. Until the end of this pass a rank has
    waited for no other one, except that FSDP2 gathers parameters: there the ranks of a node wait for each other. On a
    GPU the device's time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._started: float | torch.cuda.Event | None = None
        self._ended: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Steps whose times are not known yet: the host queues a step before the device has made the one before."""
        self._seconds = 0.0

    def start(self) -> None:
        """Note that a step begins."""
        self._started = self._now()

    def stop(self) -> None:
        """Note that the first forward pass has ended. Further calls before the next `start` are ignored."""
        started, self._started = self._started, None
        if isinstance(started, torch.cuda.Event):
            ended = self._now()
            assert isinstance(ended, torch.cuda.Event)
            self._ended.append((started, ended))
        elif started is not None:
            self._seconds = time.perf_counter() - started

    def seconds(self) -> float:
        """Time of the newest step whose time is known without waiting for the device."""
        while self._ended and self._ended[0][1].query():
            started, ended = self._ended.popleft()
            self._seconds = started.elapsed_time(ended) / 1000
        return self._seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
