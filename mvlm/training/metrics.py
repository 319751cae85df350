"""Numbers of a run's steps, on the device until a line of metrics needs them, and what the process itself takes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Numbers:
    """Scalars of the steps since the last line. They stay on the device until they are read, all in one transfer."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._sent: tuple[Tensor, Any] | None = None
        self.steps: list[int] = []
        self.samples: list[list[int]] = []
        """The sample ids of each step's batch, on this rank."""
        self.tokens = 0
        """Of all captions of this rank's batches."""
        self.waited = 0.0
        """Seconds that the steps waited for their data."""

    def add(self, step: int, samples: list[int], tokens: int, values: dict[str, Tensor], waited: float) -> None:
        """Keep the scalars of one step; their names are the same for all steps of a line."""
        self._names = list(values)
        self._rows.append(torch.stack([value.detach().float() for value in values.values()]))
        self._sent = None
        self.steps.append(step)
        self.samples.append(samples)
        self.tokens += tokens
        self.waited += waited

    def send(self) -> None:
        """Begin the transfer to the CPU, behind what the device is doing."""
        rows = torch.stack(self._rows)  # (steps, names)
        if not rows.is_cuda:
            self._sent = (rows, None)
            return
        copy = torch.empty(rows.shape, pin_memory=True).copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = (copy, event)

    def read(self) -> list[dict[str, float]]:
        """The scalars of each step. Waits for the device where it has not come as far as `send` yet."""
        if not self._rows:
            return []
        if self._sent is None:
            self.send()
        assert self._sent is not None
        rows, event = self._sent
        if event is not None:
            event.synchronize()
        return [dict(zip(self._names, row, strict=True)) for row in rows.tolist()]


def gradient_norms(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The norm of all gradients, and by part of the model (its direct children and parameters; 0 where there are none).

    Scalars, no sync.

    The whole is the norm of the norms of all tensors, as in torch's `clip_grad_norm_`.
    """
    # A part that has no gradient yet has its name too: lines of metrics are made of steps with the same names.
    parts: dict[str, list[Tensor]] = {name.split(".")[0]: [] for name, _ in model.named_parameters()}
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([gradient for _, gradient in gradients])  # pyright: ignore[reportPrivateImportUsage]
    for (name, _), norm in zip(gradients, norms, strict=True):
        parts[name.split(".")[0]].append(norm)
    nothing = torch.zeros((), device=norms[0].device)
    return _whole(norms), {name: _whole(part) if part else nothing for name, part in parts.items()}


def _whole(norms: Sequence[Tensor]) -> Tensor:
    return whole(torch.linalg.vector_norm(torch.stack(list(norms))))


def whole(x: Tensor) -> Tensor:
    """The tensor itself, or all of one that is split over ranks."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def memory_mb(device: torch.device) -> float:
    """MB: the most that tensors took on a GPU, or what the process takes now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
