"""Fields of a case of the byte counter (:mod:`mvlm_kernels.traffic`)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    sizes: the paper's sizes by name.
    samples: for each size two small values at which bytes are counted. The count is extrapolated linearly to ``sizes``.
    run: ``run(sizes, device)`` returns the inputs that get gradients, and a function of them that calls the op.
    eager: the same computation in eager torch.
    minimum, flops: fewest bytes, and floating-point operations, of (forward, backward).
    moved: formula for the bytes of (forward, backward), used instead of counting.
    """

    op: str
    shape: str
    sizes: Sizes
    samples: dict[str, tuple[int, int]]
    run: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    eager: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    minimum: Callable[[Sizes], tuple[int, int]]
    flops: Callable[[Sizes], tuple[int, int]] = lambda sizes: (0, 0)
    moved: Callable[[Sizes], tuple[int, int]] | None = None
