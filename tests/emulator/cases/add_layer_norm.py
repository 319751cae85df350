"""Cases of ``add_layer_norm``: output and gradients against loops over rows in float64."""

import itertools
from functools import partial
from typing import Any

import torch

from emulator.cases import Cases
from emulator.library import multiprocessors
from support.kernels import norms

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES: dict[str, tuple[Any, Any, Any]] = {  # of x, of y (None: no y) and of the normalised output
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "fp32": (F32, F32, F32),
    "fp32+bf16": (F32, BF16, BF16),
    "fp32-alone": (F32, None, BF16),
}
SIZES = ((197, 768), (33, 192), (7, 384), (5, 1000), (3, 65), (1, 32), (2, 20))
FAST = {"pre/fp32+bf16/33x192", "post/bf16/7x384"}


def check(post_norm: bool, types: tuple[Any, Any, Any], rows: int, width: int) -> None:
    x, y, out = types
    with multiprocessors(2):  # each program of the backward pass takes several tiles
        norms.check(norms.case(rows, width, x, y), post_norm, out)


def cases() -> Cases:
    for post_norm, (name, types), (rows, width) in itertools.product((False, True), TYPES.items(), SIZES):
        yield f"{'post' if post_norm else 'pre'}/{name}/{rows}x{width}", partial(check, post_norm, types, rows, width)
