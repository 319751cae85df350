"""Cases of ``split_linear``, and its oracle. Legend: R rows, C width, W width of a part."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mvlm_kernels.case import Case, Draw, Inputs
from mvlm_kernels.split_linear import split_linear

FAST = {"bf16/3x17x300"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""


def oracle(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Output of `split_linear` with one head, (.., 1, W) for each part: a product for each part, by einsum."""
    rows = zip(weight.tensor_split(parts), bias.tensor_split(parts), strict=True)
    return tuple((torch.einsum("...c,wc->...w", x, w) + b).unsqueeze(-2) for w, b in rows)


def ours(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
    return split_linear(x, weight.tensor_split(parts), bias.tensor_split(parts), 1)


def case(label: str, rows: int, width: int, parts: int, dtype: torch.dtype, *, multiprocessors: int = 0) -> Case:
    """Case of `split_linear` that maps x (R, 8) to `parts` outputs (R, W)."""

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"x": draw.normal(rows, 8, dtype=dtype), "weight": draw.normal(parts * width, 8, dtype=dtype)}
        return Inputs({**leaves, "bias": draw.normal(parts * width, dtype=dtype)}, {"parts": parts})

    results = "x", "weight", "bias", *(f"out {i}" for i in range(parts))
    return Case(
        "split_linear", label, dtype, make, ours, oracle, has_kernels=False, multiprocessors=multiprocessors,
        terms=dict.fromkeys(results, 4 * math.sqrt(rows)),
    )  # fmt: skip


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return []


def small(dtype: torch.dtype) -> list[Case]:
    return []


def compiled() -> Iterator[Case]:
    """Cases of two parts, as keys and values alone, and of three, as queries, keys and values."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for parts in (2, 3):
            yield case(f"{name}/768/{parts}", 64 * 197, 768, parts, dtype)


def emulated() -> Iterator[Case]:
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for parts, rows, width in ((3, 17, 300), (2, 1, 8), (3, 197, 768)):
            yield case(f"{name}/{parts}x{rows}x{width}", rows, width, parts, dtype, multiprocessors=1)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    yield from ()
