"""Cases of ``add_layer_norm``, and its oracle. Legend: R rows, C width."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.case import PAPER, SMALL, Case, Draw, Inputs

FAST = {"pre/fp32+bf16/33x192", "post/bf16/7x384"}
"""Cases that are emulated in every suite."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES: dict[str, tuple[torch.dtype, torch.dtype | None, torch.dtype]] = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (FP16, FP16, FP16),
    "fp32": (FP32, FP32, FP32),
    "fp32+bf16": (FP32, BF16, BF16),
    "fp32-alone": (FP32, None, BF16),
}
"""Dtypes of x, of y (None: no y) and of the normalised output."""


def oracle(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, y_bias: Tensor | None = None,
    post_norm: bool = False, **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Deviations of each row from its mean, over their root mean square."""
    total = x
    for summand in (y, y_bias):
        total = total if summand is None else total + summand
    deviation = total - total.mean(-1, keepdim=True)
    normalised = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    return (normalised if post_norm else total), normalised


def case(
    label: str, shape: tuple[int, ...], x: torch.dtype = FP32, y: torch.dtype | None = BF16,
    out: torch.dtype | None = BF16, parameters: torch.dtype = FP32, *, with_y_bias: bool = True,
    post_norm: bool = False, eps: float = 1e-5, multiprocessors: int = 0,
) -> Case:  # fmt: skip
    """x and y of this shape, (.., C), in their dtypes; y None leaves out y and y_bias. out: dtype of the norm."""
    (*leading, width), rows = shape, torch.Size(shape[:-1]).numel()
    made = out or y or x

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"x": draw.normal(*leading, width, dtype=x)}
        if y is not None:
            leaves["y"] = draw.normal(*leading, width, dtype=y)
        leaves |= {name: draw.normal(width, dtype=parameters) for name in ("weight", "bias")}
        if y is not None and with_y_bias:
            leaves["y_bias"] = draw.normal(width, dtype=parameters)
        return Inputs(leaves, {"eps": eps, "out_dtype": out, "post_norm": post_norm, **({} if y else {"y": None})})

    stream = x if y is None else torch.promote_types(x, y)
    values, wide, item = rows * width, stream.itemsize, 0 if y is None else y.itemsize
    both = wide if post_norm and made != stream else 0  # bytes of a value of the norm in the stream's dtype
    moments, vector = 8 * rows, parameters.itemsize * width
    minimum = (
        values * (x.itemsize + item + wide + both + made.itemsize) + moments + 3 * vector,
        values * (wide + made.itemsize + wide + x.itemsize + item) + moments + 4 * vector,
    )
    return Case(
        "add_layer_norm", label, made, make, add_layer_norm, oracle, minimum, multiprocessors=multiprocessors,
        # A 16-bit stream rounds the sum, whose relative error the norm and all gradients inherit.
        rms=2e-2 if stream.itemsize == 2 else None,
        terms=dict.fromkeys(("out 0", "out 1", "x", "y", "y_bias", "weight", "bias"), 4 * rows**0.5),
    )  # fmt: skip


def between_layers(
    rows: int, dtype: torch.dtype, width: int = PAPER.width, post_norm: bool = False, core: bool = False
) -> Case:
    """x + y + y_bias in float32, and its LayerNorm in another dtype, as between two layers of a block."""
    label = f"{rows} rows of {width}, residual in float32{', post-norm' if post_norm else ''}"
    return replace(case(label, (rows, width), FP32, dtype, dtype, post_norm=post_norm, eps=1e-6), core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    rows = 197 * batch
    return [between_layers(2 * rows, dtype, core=True), between_layers(rows, dtype, post_norm=True, core=True)]


def small(dtype: torch.dtype) -> list[Case]:
    return [between_layers(37, dtype, SMALL.width)]


def compiled() -> Iterator[Case]:
    for width, post_norm in itertools.product((192, 384, 768, 1024), (False, True)):
        yield case(f"bf16/{width}/{'post' if post_norm else 'pre'}", (64, 197, width), post_norm=post_norm)
    yield case("fp16/768/pre", (64, 197, 768), FP32, FP16, FP16)
    yield case("fp32/768/pre", (64, 197, 768), FP32, FP32, FP32)
    yield case("bf16/768/without-y", (64, 197, 768), y=None)
    yield case("bf16/768/bf16-stream", (64, 197, 768), BF16, BF16, BF16, BF16)
    yield case("bf16/1000/pre", (64, 197, 1000))


def emulated() -> Iterator[Case]:
    """Each program of the backward pass takes several tiles."""
    sizes = ((197, 768), (33, 192), (7, 384), (5, 1000), (3, 65), (1, 32), (2, 20))
    for post_norm, (name, types), (rows, width) in itertools.product((False, True), TYPES.items(), sizes):
        label = f"{'post' if post_norm else 'pre'}/{name}/{rows}x{width}"
        yield case(label, (rows, width), *types, post_norm=post_norm, multiprocessors=2)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Few narrow rows. Another `number` has other sizes."""
    shape = 2 + number, 3 + number, 8
    yield case("norm", shape, parameters, dtype, None, parameters)
    yield case("post-norm", shape, parameters, dtype, None, parameters, post_norm=True, with_y_bias=False)
