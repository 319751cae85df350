"""Cases of every op, which tests, the emulator, the ahead-of-time compiler and benchmarks read.

``cases.py`` of an op's folder has these functions, and the set ``FAST`` of the cases that are emulated in every suite.
"""

from collections.abc import Iterator
from itertools import chain
from types import ModuleType

import torch

from mvlm_kernels.add_layer_norm import cases as add_layer_norm
from mvlm_kernels.case import Case
from mvlm_kernels.contrastive_loss import cases as contrastive_loss
from mvlm_kernels.cross_attention import cases as cross_attention
from mvlm_kernels.gather_patches import cases as gather_patches
from mvlm_kernels.gelu_linear import cases as gelu_linear
from mvlm_kernels.pixel_loss import cases as pixel_loss
from mvlm_kernels.place_tokens import cases as place_tokens
from mvlm_kernels.qk_norm_rope import cases as qk_norm_rope
from mvlm_kernels.split_linear import cases as split_linear

OPS: tuple[ModuleType, ...] = (
    add_layer_norm, gelu_linear, cross_attention, gather_patches, pixel_loss, place_tokens, split_linear,
    contrastive_loss, qk_norm_rope,
)  # fmt: skip
"""Modules of the ops' cases, the most important op first. A new op is one line here."""


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    """Cases that are timed against other implementations, for a batch of `batch` images."""
    return list(chain.from_iterable(op.timed(batch, dtype) for op in OPS))


def small(dtype: torch.dtype) -> list[Case]:
    """One case of each kernel, and of each layout of attention, at sizes of which none is a multiple of a tile."""
    return list(chain.from_iterable(op.small(dtype) for op in OPS))


def compiled() -> Iterator[Case]:
    """Cases that are compiled ahead of time, at the paper's sizes. Several may have one label."""
    return chain.from_iterable(op.compiled() for op in OPS)


def emulated() -> dict[str, Case]:
    """Cases that run as compiled on an emulated GPU, by op and label. The small ones are among them."""
    found = [case for op in OPS for case in (*op.emulated(), *op.small(torch.bfloat16))]
    return {f"{case.op}/{case.label}": case for case in found}


def fast() -> set[str]:
    """Names "op/label" of the emulated cases that every run of the tests takes. They launch all kernels."""
    return {f"{case.op}/{case.label}" for op in OPS for case in op.emulated() if case.label in op.FAST}


def properties(
    number: int = 0, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None
) -> dict[str, Case]:
    """Small cases by label, whose sizes depend on the number; with 4, sizes are equal only where they have to be.

    parameters: dtype of what autocast leaves in float32, such as weights, if it is another one.
    """
    return {case.label: case for op in OPS for case in op.properties(number, dtype, parameters or dtype)}
