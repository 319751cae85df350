"""Result of a swap in someone else's model: which parts were swapped, which were not and why, and the way back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mvlm_kernels.refusals import Refusal, refusal

ALREADY_SWAPPED = refusal("it is swapped already", "undo the earlier swap first")
# accelerate puts its hooks on a module so. Such a forward would run in place of ours, or be lost.
OTHER_FORWARD = refusal(
    "it has a forward of its own, as hooks of accelerate put on", "remove it, swap, put it on again"
)


@dataclass(frozen=True)
class Part:
    """One part of a model that a swap looked at.

    path: name of the module in the model, "" for the model itself. kind: class of the module. reason: why it was left
    as it was; None if it was swapped.
    """

    path: str
    kind: str
    reason: Refusal | None = None


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

    def undo(self) -> None:
        """Put the original parts back. Parameters keep their present values."""
        self.restore()

    def __str__(self) -> str:
        lines = [
            f"{'swapped' if part.reason is None else 'kept'}: {part.path or 'the model'} ({part.kind})"
            + (f": {part.reason}" if part.reason else "")
            for part in self.parts
        ]
        return "\n".join(lines or ["nothing to swap"])
