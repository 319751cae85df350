"""Cases of ``add_layer_norm``, and its oracle. Legend: R rows, C width."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.case import PAPER, SMALL, Case, Draw, Inputs

FAST = {"pre/fp32+bf16/33x192", "post/bf16/7x384", "adaln/fp32+bf16/3x21x192", "rms-adaln/bf16/2x5x65"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
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
    x: Tensor, y: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    y_bias: Tensor | None = None, post_norm: bool = False, gate: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, kind: str = "layer", **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Residual stream and norm, as `add_layer_norm` returns them, by other formulas.

    A norm is the deviations of each row from its mean, or for RMSNorm from zero, over their root mean square.
    """

    def repeated(vector: Tensor) -> Tensor:
        """Repeat a vector (C,) for every row, or the vectors (B, C) for the rows of their samples: x's shape."""
        return vector.expand(x.shape) if vector.ndim == 1 else torch.stack([v.expand(x.shape[1:]) for v in vector])

    added = [summand for summand in (y, y_bias) if summand is not None]
    total = x + sum(added[1:], added[0]) * (1 if gate is None else repeated(gate)) if added else x
    deviation = total if kind == "rms" else total - total.mean(-1, keepdim=True)
    normalised = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    normalised = normalised * (1 if weight is None else weight) + (0 if bias is None else bias)
    normalised = normalised + (0 if scale is None else repeated(scale) * normalised)
    normalised = normalised + (0 if shift is None else repeated(shift))
    return (normalised if post_norm else total), normalised


@dataclass(frozen=True)
class Vectors:
    """Choice of the optional vectors that a case of `add_layer_norm` passes beside x and y, and of its kind of norm."""

    affine: str = "weight bias"
    """Arguments of the norm that are passed: names out of weight and bias, with blanks between."""
    y_bias: bool = True
    samples: str = ""
    """Names out of gate, scale and shift that are passed as (B, C): slices of one tensor, as AdaLN has them."""
    channels: str = ""
    """Names out of gate, scale and shift that are passed as (C,)."""
    kind: str = "layer"


NORM, AFTER_BIAS = Vectors(), Vectors(y_bias=False)
LAYER_SCALE = Vectors(channels="gate", y_bias=False)
RMS_NORM = Vectors("weight", channels="gate", y_bias=False, kind="rms")
ADALN = Vectors("", samples="gate scale shift", y_bias=False)
"""Vectors of the second norm of a DiT block, which has neither weight nor bias."""
RMS_ADALN = Vectors("weight", samples="gate scale", y_bias=False, kind="rms")
"""Vectors of the second norm of a block of Lumina or Z-Image."""
ALL = Vectors(samples="gate shift", channels="scale")
MODULATED = {"layer-scale": LAYER_SCALE, "rms": RMS_NORM, "adaln": ADALN, "rms-adaln": RMS_ADALN, "all": ALL}


def case(
    label: str, shape: tuple[int, ...], x: torch.dtype = FP32, y: torch.dtype | None = BF16,
    out: torch.dtype | None = BF16, parameters: torch.dtype = FP32, vectors: Vectors = NORM, *,
    post_norm: bool = False, eps: float = 1e-5, multiprocessors: int = 0,
) -> Case:  # fmt: skip
    """Case of `add_layer_norm` with x and y of one shape, (B, .., C).

    x, y, out: dtypes of x, of y and of the norm. If y is None, y and y_bias are left out. parameters: dtype of the
    vectors (C,). multiprocessors: of the emulated GPU, see :class:`mvlm_kernels.case.Case`.
    """
    (*leading, width), rows = shape, torch.Size(shape[:-1]).numel()
    made, slices, named = out or y or x, vectors.samples.split(), vectors.affine.split()
    named += ["y_bias"] * (y is not None and vectors.y_bias) + vectors.channels.split()

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"x": draw.normal(*leading, width, dtype=x)}
        if y is not None:
            leaves["y"] = draw.normal(*leading, width, dtype=y)
        leaves |= {name: draw.normal(width, dtype=parameters) for name in named}
        if slices:
            leaves |= zip(slices, draw.normal(shape[0], len(slices), width, dtype=y or x).unbind(1), strict=True)
        absent = {name: None for name in ("y", "weight", "bias") if name not in leaves}
        options = {"kind": vectors.kind} if vectors.kind != "layer" else {}
        return Inputs(leaves, {"eps": eps, "out_dtype": out, "post_norm": post_norm, **absent, **options})

    stream = x if y is None else torch.promote_types(x, y)
    values, wide, item = rows * width, stream.itemsize, 0 if y is None else y.itemsize
    both = wide if post_norm and made != stream else 0  # bytes of a value of the norm in the stream's dtype
    again = item if "gate" in named + slices else 0  # the gradient of the gate reads y
    moments = 4 * rows * (1 if vectors.kind == "rms" else 2)

    def bytes_of(names: set[str]) -> int:
        """Bytes of the vectors with these names; a vector that the case does not pass counts 0."""
        of_one, of_samples = (len(names.intersection(has)) for has in (named, slices))
        return width * (parameters.itemsize * of_one + shape[0] * (y or x).itemsize * of_samples)

    minimum = (
        values * (x.itemsize + item + wide + both + made.itemsize) + moments + bytes_of({*named, *slices}),
        values * (wide + made.itemsize + wide + x.itemsize + item + again)
        + moments
        + bytes_of({*named, *slices})
        + bytes_of({"weight", "gate", "scale"}),
    )
    return Case(
        "add_layer_norm", label, made, make, add_layer_norm, oracle, minimum, multiprocessors=multiprocessors,
        # A 16-bit stream rounds the sum, whose relative error the norm and all gradients inherit.
        rms=2e-2 if stream.itemsize == 2 else None,
        terms=dict.fromkeys(("out 0", "out 1", "x", "y", *named, *slices), 4 * math.sqrt(rows)),
    )  # fmt: skip


def between_layers(
    rows: int, dtype: torch.dtype, width: int = PAPER.width, post_norm: bool = False, core: bool = False
) -> Case:
    """x + y + y_bias in float32, and its LayerNorm in another dtype, as between two layers of a block."""
    label = f"{rows} rows of {width}, residual in float32{', post-norm' if post_norm else ''}"
    return replace(case(label, (rows, width), FP32, dtype, dtype, post_norm=post_norm, eps=1e-6), core=core)


def modulated(batch: int, dtype: torch.dtype, rows: int = 197, width: int = PAPER.width) -> Case:
    """x + gate * y in float32, and its norm with scale and shift in another dtype, as in a DiT block."""
    label = f"{batch} x {rows} rows of {width}, residual in float32, gate, scale and shift of each sample"
    return case(label, (batch, rows, width), FP32, dtype, dtype, vectors=ADALN, eps=1e-6)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    rows = 197 * batch
    return [
        between_layers(2 * rows, dtype, core=True),
        between_layers(rows, dtype, post_norm=True, core=True),
        modulated(batch, dtype),
    ]


def small(dtype: torch.dtype) -> list[Case]:
    return [between_layers(37, dtype, SMALL.width), modulated(3, dtype, 7, SMALL.width)]


def compiled() -> Iterator[Case]:
    for width, post_norm in itertools.product((192, 384, 768, 1024), (False, True)):
        yield case(f"bf16/{width}/{'post' if post_norm else 'pre'}", (64, 197, width), post_norm=post_norm)
    yield case("fp16/768/pre", (64, 197, 768), FP32, FP16, FP16)
    yield case("fp32/768/pre", (64, 197, 768), FP32, FP32, FP32)
    yield case("bf16/768/without-y", (64, 197, 768), y=None)
    yield case("bf16/768/bf16-stream", (64, 197, 768), BF16, BF16, BF16, BF16)
    yield case("bf16/1000/pre", (64, 197, 1000))
    widths = dict.fromkeys(MODULATED, (768, 3072)) | dict.fromkeys(("adaln", "all"), (384, 768, 1152, 1536, 2304, 3072))
    for name, width in ((of, width) for of in widths for width in widths[of]):
        yield case(f"bf16/{width}/{name}", (64, 197, width), vectors=MODULATED[name])
    yield case("bf16/3072/adaln/bf16-stream", (64, 197, 3072), BF16, BF16, BF16, BF16, ADALN)
    yield case("fp32/768/adaln", (64, 197, 768), FP32, FP32, FP32, vectors=ADALN)


def emulated() -> Iterator[Case]:
    """Cases for the PTX emulator, on whose GPU of two multiprocessors a program of backward takes several tiles."""
    sizes = ((197, 768), (33, 192), (7, 384), (5, 1000), (3, 65), (1, 32), (2, 20))
    for post_norm, (name, types), (rows, width) in itertools.product((False, True), TYPES.items(), sizes):
        label = f"{'post' if post_norm else 'pre'}/{name}/{rows}x{width}"
        yield case(label, (rows, width), *types, post_norm=post_norm, multiprocessors=2)
    for name, types, shape in itertools.product(MODULATED, ("bf16", "fp32+bf16"), ((3, 21, 192), (2, 5, 65))):
        label = f"{name}/{types}/{'x'.join(map(str, shape))}"
        yield case(label, shape, *TYPES[types], vectors=MODULATED[name], multiprocessors=2)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of few narrow rows, whose sizes depend on `number`; see :func:`mvlm_kernels.cases.properties`."""
    shape, types = (2 + number, 3 + number, 8), (parameters, dtype, None, parameters)
    yield case("norm", shape, *types)
    yield case("post-norm", shape, *types, AFTER_BIAS, post_norm=True)
    yield case("modulated norm", shape, *types, ALL)
    yield case("modulated RMS norm", shape, *types, RMS_ADALN)
