"""What a case of the byte counter and the benchmarks is, and the paper's sizes that several of them share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One op at one shape. ``run(sizes, device)`` returns inputs that get gradients, and a function of them; ``usual``
    the same in plain torch. Both passes' minimum in bytes and floating-point operations are functions of the sizes."""

    op: str
    shape: str
    sizes: Sizes
    samples: dict[str, tuple[int, int]]
    run: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    usual: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    minimum: Callable[[Sizes], tuple[int, int]]
    flops: Callable[[Sizes], tuple[int, int]] = lambda sizes: (0, 0)
    moved: Callable[[Sizes], tuple[int, int]] | None = None


CHANNELS, PATCH, SIDE, PATCHES, MASKED, WIDTH = 3, 16, 224, 196, 116, 768
FEATURES = CHANNELS * PATCH * PATCH


def patch_ids(batch: int, count: int, device: str, patches: int = PATCHES) -> Tensor:
    # Which patches they are moves no bytes; that they are distinct does.
    return (
        torch.arange(count, dtype=torch.int32, device=device)
        .mul(5)
        .remainder(patches)
        .expand(batch, count)
        .contiguous()
    )
