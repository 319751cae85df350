"""Cases and peers of the layers around attention: residual with LayerNorm, the feed-forward's GELU, and the LM head.

Some of these ops are newer than others. Where `mvlm_kernels` does not have one, the row of `ours` says so, and the
peers are timed. Builders of peers follow the rules of :mod:`mvlm_benchmarks.kernels.peers`.

Shape legend: M masked tokens, R rows, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mvlm_kernels
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm_benchmarks.kernels.inputs import PAPER, Case, Inputs, RandomInputs
from mvlm_benchmarks.unavailable import Missing

EPS, WIDTH = 1e-6, PAPER.width

Function = Callable[..., Any]


def layer_cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """Cases for `batch` images. A small batch, as on a CPU, gets a small vocabulary too."""
    vocabulary = 50_265 if batch >= 32 else 2_048
    return [
        add_layer_norm_case(2 * batch * 197, dtype, core=True),
        add_layer_norm_case(batch * 197, dtype, post_norm=True, core=True),
        gelu_linear_case(2 * batch * 197, dtype, core=True),
        # Captions have 12 tokens on average, of which 30 % are masked.
        _linear_cross_entropy(round(3.6 * batch), vocabulary, dtype),
    ]


def add_layer_norm_case(
    rows: int, dtype: torch.dtype, width: int = WIDTH, post_norm: bool = False, core: bool = False
) -> Case:
    """x + y + y_bias in float32, and its LayerNorm in the case's dtype, as between two layers of a block."""

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "x": random.normal(rows, width, dtype=torch.float32),
            "y": random.normal(rows, width),
            "weight": random.normal(width, dtype=torch.float32),
            "bias": random.normal(width, dtype=torch.float32),
            "y_bias": random.normal(width, dtype=torch.float32),
        }
        return Inputs(leaves, {"eps": EPS, "out_dtype": dtype, "post_norm": post_norm})

    def reference(
        x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_bias: Tensor, eps: float, out_dtype: Any, post_norm: bool
    ) -> Any:
        total = x + y + y_bias
        normalised = F.layer_norm(total, (width,), weight, bias, eps)
        return (normalised if post_norm else total), normalised

    item, elements = dtype.itemsize, rows * width
    both = 4 if post_norm and item < 4 else 0  # bytes of a value of the norm in float32
    moments, vectors = 8 * rows, 4 * width
    minimum = (
        elements * (4 + item + 4 + both + item) + moments + 3 * vectors,
        elements * (4 + item + 4 + 4 + item) + moments + 4 * vectors,
    )
    shape = f"{rows} rows of {width}, residual in float32{', post-norm' if post_norm else ''}"
    ours = getattr(mvlm_kernels, "add_layer_norm", None)
    return Case("add_layer_norm", shape, dtype, make, ours, reference, minimum, core=core)


def gelu_linear_case(rows: int, dtype: torch.dtype, width: int = WIDTH, core: bool = False) -> Case:
    """linear(gelu(h + h_bias)): the second half of a feed-forward layer, with its parameters in float32."""
    hidden = 4 * width

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "h": random.normal(rows, hidden),
            "weight": random.normal(width, hidden, scale=hidden**-0.5, dtype=torch.float32),
            "bias": random.normal(width, dtype=torch.float32),
            "h_bias": random.normal(hidden, dtype=torch.float32),
        }
        return Inputs(leaves, {})

    def reference(h: Tensor, weight: Tensor, bias: Tensor, h_bias: Tensor) -> Tensor:
        return F.linear(F.gelu(h + h_bias), weight, bias)

    item, product = dtype.itemsize, 2 * rows * hidden * width
    parameters = 4 * (width * hidden + width + hidden)
    minimum = (
        item * rows * (hidden + width) + parameters,
        item * rows * (2 * hidden + width) + 2 * parameters,
    )
    shape = f"{rows} rows of {hidden} -> {width}, parameters in float32"
    ours = getattr(mvlm_kernels, "gelu_linear", None)
    sizes, flops = (rows, width, hidden), (product, 2 * product)
    return Case("gelu_linear", shape, dtype, make, ours, reference, minimum, flops, core, product=sizes)


def _linear_cross_entropy(rows: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """Cross-entropy of the language-model head, without keeping the logits."""

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "x": random.normal(rows, WIDTH),
            "weight": random.normal(vocabulary, WIDTH, scale=WIDTH**-0.5),
            "bias": random.normal(vocabulary, scale=0.1),
        }
        return Inputs(leaves, {"targets": random.integers(vocabulary, rows)})

    def reference(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), targets)

    def ours(**arguments: Any) -> Tensor:
        return linear_cross_entropy(**arguments)[0]

    item, product = dtype.itemsize, 2 * rows * vocabulary * WIDTH
    matrix, states = item * vocabulary * (WIDTH + 1), item * rows * WIDTH
    # Forward computes the gradients too, and saves them for backward.
    minimum = 2 * matrix + 2 * states + 8 * rows + 4, 2 * matrix + 2 * states + 4
    sizes, flops = (rows, vocabulary, WIDTH), (3 * product, 0)
    return Case(
        "linear_cross_entropy", f"{rows} rows of {WIDTH}, vocabulary {vocabulary}", dtype, make, ours, reference,
        minimum, flops, product=sizes, has_kernels=False,
    )  # fmt: skip


def cross_entropy_eager(inputs: Inputs) -> Function:
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def cross_entropy_liger(inputs: Inputs) -> Function:
    """Liger's fused linear layer and cross-entropy, the model of ours."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    _require_cuda(inputs)
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: liger_fused_linear_cross_entropy(x, weight, targets, bias)


def cross_entropy_quack(inputs: Inputs) -> Function:
    """torch's product, then QuACK's cross-entropy of the whole logits."""
    from quack import cross_entropy  # pyright: ignore[reportMissingImports]

    _require_cuda(inputs)
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: cross_entropy(F.linear(x, weight, bias), targets, reduction="mean")


def norm_eager(inputs: Inputs) -> Function:
    """The chain of torch ops that autocast runs: the linear layer's bias, add, LayerNorm in float32, cast."""
    return _norm_chain(inputs, lambda x, weight, bias, eps: F.layer_norm(x, (WIDTH,), weight, bias, eps))


def _norm_chain(inputs: Inputs, layer_norm: Function) -> Function:
    eps, dtype, post_norm = (inputs.fixed[name] for name in ("eps", "out_dtype", "post_norm"))

    def compute(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + (y + y_bias.to(y))
        normalised = layer_norm(total, weight, bias, eps)
        return (normalised if post_norm else total), normalised.to(dtype)

    return compute


def norm_tri_dao(inputs: Inputs) -> Function:
    """flash-attn's Triton LayerNorm, which adds the residual in float32 in the same pass. It takes no bias of y."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn  # pyright: ignore[reportMissingImports]

    _require_cuda(inputs)
    eps, dtype, post_norm = (inputs.fixed[name] for name in ("eps", "out_dtype", "post_norm"))

    def compute(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_bias: Tensor) -> tuple[Tensor, Tensor]:
        normalised, total = layer_norm_fn(
            y + y_bias.to(y), weight, bias, residual=x, eps=eps, prenorm=True, residual_in_fp32=True
        )
        return (normalised.float() if post_norm else total), normalised.to(dtype)

    return compute


def norm_liger(inputs: Inputs) -> Function:
    """The chain with Liger's LayerNorm. Liger fuses the residual with RMSNorm only."""
    from liger_kernel.transformers.functional import liger_layer_norm  # pyright: ignore[reportMissingImports]

    _require_cuda(inputs)
    return _norm_chain(inputs, liger_layer_norm)


def gelu_eager(inputs: Inputs) -> Function:
    """The chain of torch ops that autocast runs, with parameters cast to the dtype of h."""
    return lambda h, weight, bias, h_bias: F.linear(F.gelu(h + h_bias.to(h)), weight.to(h), bias.to(h))


def _require_cuda(inputs: Inputs) -> None:
    if not next(iter(inputs.leaves.values())).is_cuda:
        raise Missing("needs a CUDA device")
