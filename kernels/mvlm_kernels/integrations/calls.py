"""Report of a swap in someone else's model: the swapped parts, and the calls of them that the op computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention import why_not_triton
from mvlm_kernels.dispatch import Refusal, refusal

ALREADY_SWAPPED = refusal("it is swapped already", "undo the earlier swap first")
# accelerate puts its hooks on a module so. Such a forward would run in place of ours, or be lost.
OTHER_FORWARD = refusal(
    "it has a forward of its own, as hooks of accelerate put on", "remove it, swap, put it on again"
)

ELSEWHERE = (
    "mvlm_kernels.integrations.transformers swaps the attention of transformers' models, .timm the patch embedding of "
    "timm's, .blocks the layers of others"
)


@dataclass(frozen=True)
class Part:
    """One part of a model that a swap looked at.

    path: name of the module in the model, "" for the model itself. kind: class of the module. reason: why it was left
    as it was; None if it was swapped. fused: what is one call of an op in a swapped part; "" for all of it.
    """

    path: str
    kind: str
    reason: Refusal | None = None
    fused: str = ""


@dataclass
class SwapReport:
    """Parts of a model that a swap looked at, in the model's order.

    ``str(report)`` has one line a part. :meth:`undo` puts everything back.
    """

    parts: Sequence[Part]
    restore: Callable[[], None] = field(repr=False)

    @property
    def swapped(self) -> tuple[Part, ...]:
        """Parts that now use the kernels."""
        return tuple(part for part in self.parts if part.reason is None)

    @property
    def kept(self) -> tuple[Part, ...]:
        """Parts that were left as they were; each has a reason."""
        return tuple(part for part in self.parts if part.reason is not None)

    def undo(self) -> tuple[Part, ...]:
        """Put the original parts back, and return them. Parameters keep their present values."""
        self.restore()
        return self.swapped

    def __str__(self) -> str:
        lines = [
            f"{'swapped' if part.reason is None else 'kept'}: {part.path or 'the model'} ({part.kind})"
            + (f": {part.reason or part.fused}" if part.reason or part.fused else "")
            for part in self.parts
        ]
        return "\n".join(lines or [f"nothing to swap: {ELSEWHERE}"])


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention in a swapped model.

    kind: class of the calling module. reasons: why the library's own attention ran; empty if the op did.
    """

    kind: str
    queries: int
    keys: int
    reasons: tuple[Refusal, ...]


_calls: list[AttentionCall] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[AttentionCall]]:
    """List of all attention calls of swapped models inside the block, in all threads, in the order of their start."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def recording() -> bool:
    """True inside :func:`recorded_calls`."""
    return _calls is not None


def record(module: object, queries: int, keys: int, reasons: tuple[Refusal, ...]) -> None:
    """Add a call to the list of :func:`recorded_calls`, if there is one."""
    if _calls is not None:
        _calls.append(AttentionCall(type(module).__name__, queries, keys, reasons))


def kernel_reasons(device: torch.device, dtype: torch.dtype, width: int, short_rows: int) -> tuple[Refusal, ...]:
    """Reasons why a model keeps its own attention: no kernel runs the call. Empty if one does.

    dtype: after autocast. width: of a head. short_rows: the shorter of the two lengths. On a device without kernels the
    library's own code is as fast as ours or faster, so the op is not called there, except under
    :func:`mvlm_kernels.use_backend`.
    """
    if torch.compiler.is_compiling():
        # A plain int, so that the result is a constant of the graph. Comparisons would bound an exported length, so
        # they are left out where the length does not matter.
        matters = device.type == "cuda" or dispatch.forced() is not None
        short_rows = next(rows for rows in (16, 32, 64, 128, 256, 2**31) if short_rows <= rows) if matters else 1
    return _kernel_reasons(device, dtype, int(width), short_rows, dispatch.forced())


@dispatch.constant_when_compiled
def _kernel_reasons(
    device: torch.device, dtype: torch.dtype, width: int, short_rows: int, forced: str | None
) -> tuple[Refusal, ...]:
    found = why_not_triton(device, dtype, head_width=width, short_rows=short_rows)
    if found and forced is not None and device.type != "cuda":
        without = dispatch.device_reasons(device)
        return tuple(reason for reason in found if reason not in without)
    return found
