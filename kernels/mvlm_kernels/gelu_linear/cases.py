"""Cases of ``gelu_linear``, and its oracle. Legend: R rows, C hidden width, D output width."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mvlm_kernels.case import PAPER, SMALL, Case, Draw, Inputs
from mvlm_kernels.gelu_linear import gelu_linear

FAST = {"bf16/17x300/bias"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RMS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Bounds of relative errors where weights and products are rounded too."""


def oracle(h: Tensor, weight: Tensor, bias: Tensor | None = None, h_bias: Tensor | None = None) -> Tensor:
    """Output of `gelu_linear` by other formulas: x Phi(x) of each value by the error function, a product by einsum."""
    x = h if h_bias is None else h + h_bias
    out = torch.einsum("...c,dc->...d", x * (1 + torch.erf(x / math.sqrt(2))) / 2, weight.to(x.dtype))
    return out if bias is None else out + bias


def case(
    label: str, shape: tuple[int, ...], out: int, dtype: torch.dtype, parameters: torch.dtype = torch.float32,
    *, bias: torch.dtype | None = None, h_bias: torch.dtype | None = None, frozen: bool = False, spread: float = 3.0,
    scale: float = 1.0, multiprocessors: int = 0,
) -> Case:  # fmt: skip
    """Case of `gelu_linear` with h of this shape, (.., C), and `out` output features.

    parameters: dtype of the weight; bias, h_bias: of the two biases, None for none. frozen: the weight has no gradient.
    spread: of h, by default such that its values reach both tails of the GELU. scale: of the weight.
    """
    (*leading, hidden), rows = shape, torch.Size(shape[:-1]).numel()

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"h": draw.normal(*leading, hidden, dtype=dtype, scale=spread)}
        leaves["weight"] = draw.normal(out, hidden, dtype=parameters, scale=scale)
        leaves |= {} if bias is None else {"bias": draw.normal(out, dtype=bias)}
        leaves |= {} if h_bias is None else {"h_bias": draw.normal(hidden, dtype=h_bias)}
        fixed = {"weight": leaves.pop("weight")} if frozen else {}
        return Inputs(leaves, fixed)

    item, product = dtype.itemsize, 2 * rows * hidden * out
    of_parameters = parameters.itemsize * (out * hidden + out + hidden)
    minimum = (
        item * rows * (hidden + out) + of_parameters,
        item * rows * (2 * hidden + out) + 2 * of_parameters,
    )
    return Case(
        "gelu_linear", label, dtype, make, gelu_linear, oracle, minimum, (product, 2 * product),
        product=(rows, out, hidden), multiprocessors=multiprocessors, rms=RMS.get(dtype),
        terms=dict.fromkeys(("out", "h", "weight", "bias", "h_bias"), 50.0),
    )  # fmt: skip


def _feed_forward(rows: int, dtype: torch.dtype, width: int = PAPER.width, core: bool = False) -> Case:
    """Second half of a feed-forward layer, with its parameters in float32."""
    hidden, fp32 = 4 * width, torch.float32
    label = f"{rows} rows of {hidden} -> {width}, parameters in float32"
    made = case(label, (rows, hidden), width, dtype, bias=fp32, h_bias=fp32, spread=1.0, scale=hidden**-0.5)
    return replace(made, core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return [_feed_forward(2 * batch * 197, dtype, core=True)]


def small(dtype: torch.dtype) -> list[Case]:
    return [_feed_forward(37, dtype, SMALL.width)]


def compiled() -> Iterator[Case]:
    def of(label: str, width: int, dtype: torch.dtype, bias: torch.dtype | None, frozen: bool = False) -> Case:
        return case(label, (64, 197, width), 8, dtype, h_bias=bias, frozen=frozen)

    bf16, fp16, fp32 = TYPES.values()
    for width in (768, 3072):
        yield of(f"bf16/{width}/fp32-bias", width, bf16, fp32)
    yield of("bf16/3072/fp32-bias/frozen", 3072, bf16, fp32, frozen=True)
    yield of("bf16/3072/no-bias", 3072, bf16, None)
    yield of("fp16/3072/fp16-bias", 3072, fp16, fp16)
    yield of("fp32/3072/fp32-bias", 3072, fp32, fp32)


def emulated() -> Iterator[Case]:
    """Cases for the PTX emulator, on whose small GPU each program of the backward pass takes several tiles."""
    sizes = ((197, 1024), (17, 300), (1, 8), (3, 3072))
    for (name, dtype), (rows, width), bias in itertools.product(TYPES.items(), sizes, (True, False)):
        label = f"{name}/{rows}x{width}/{'bias' if bias else 'no-bias'}"
        h_bias = dtype if bias else None
        yield case(label, (rows, width), 5, dtype, dtype, bias=dtype, h_bias=h_bias, multiprocessors=1)
    for name, dtype in TYPES.items():
        options = {"bias": dtype, "h_bias": dtype, "frozen": True, "multiprocessors": 1}
        yield case(f"{name}/17x300/frozen", (17, 300), 5, dtype, dtype, **options)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of few narrow rows, whose sizes depend on `number`; see :func:`mvlm_kernels.cases.properties`."""
    batch, rows = 2 + number, 3 + number
    yield case("gelu", (batch, rows, 8), 4, dtype, parameters, bias=parameters, spread=1.0)
    yield case("gelu of rows", (rows, 8), 4, dtype, parameters, spread=1.0)
    yield case(
        "gelu with its bias", (batch, rows, 8), 4, dtype, parameters, bias=parameters, h_bias=parameters, spread=1.0
    )
