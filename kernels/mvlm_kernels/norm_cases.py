"""Byte counter cases of ``add_layer_norm`` and ``gelu_linear``, at the sizes of a base model's image encoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.case import Case, Sizes
from mvlm_kernels.gelu_linear import gelu_linear

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 256 * 197


class _Used(torch.autograd.Function):
    """A scalar that all given tensors are used for: their gradients are tensors of their own sizes, read in full."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def layer_norm(post_norm: bool) -> Case:
    """A float32 stream, a bfloat16 addend with its bias, and a bfloat16 norm. Rows are sampled past one wave."""
    width = 768

    def leaves(sizes: Sizes, device: str) -> list[Tensor]:
        stream = torch.zeros(sizes["R"], width, device=device)
        vectors = [torch.zeros(width, device=device) for _ in range(3)]
        return [t.requires_grad_() for t in (stream, torch.zeros_like(stream, dtype=BF16), *vectors)]

    def run(sizes: Sizes, device: str) -> Any:
        def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _Used.apply(*add_layer_norm(x, y, weight, bias, y_bias=y_bias, post_norm=post_norm))  # pyright: ignore[reportReturnType]

        return leaves(sizes, device), call

    def eager(sizes: Sizes, device: str) -> Any:
        def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            total = x + (y + y_bias.to(BF16))  # a linear layer adds its bias in its product, and sums its gradient
            normalised = F.layer_norm(total, (width,), weight, bias)
            return _Used.apply(normalised if post_norm else total, normalised.to(BF16))  # pyright: ignore[reportReturnType]

        return leaves(sizes, device), call

    def minimum(sizes: Sizes) -> tuple[int, int]:
        rows, values = sizes["R"], sizes["R"] * width
        moments, vectors = 8 * rows, 4 * width
        forward = values * (4 + 2 + 4 + 2 + 4 * post_norm) + moments + 3 * vectors
        return forward, values * (2 + 4 + 4 + 4 + 2) + moments + 4 * vectors

    shape = f"B256 197 rows width 768, {'post' if post_norm else 'pre'}-norm"
    return Case("add_layer_norm", shape, {"R": ROWS}, {"R": (2112, 3168)}, run, eager, minimum)


def gelu() -> Case:
    """bfloat16 rows of four times the width, with a float32 bias. The products are torch's and are not counted."""
    width = 3072

    def leaves(sizes: Sizes, device: str) -> list[Tensor]:
        h = torch.zeros(sizes["R"], width, dtype=BF16, device=device)
        return [t.requires_grad_() for t in (h, torch.zeros(width, device=device))]

    def run(sizes: Sizes, device: str) -> Any:
        weight = torch.zeros(1, width, dtype=BF16, device=device)
        return leaves(sizes, device), lambda h, bias: _Used.apply(gelu_linear(h, weight, h_bias=bias))

    def eager(sizes: Sizes, device: str) -> Any:
        return leaves(sizes, device), lambda h, bias: _Used.apply(F.gelu(h + bias.to(BF16)))

    def minimum(sizes: Sizes) -> tuple[int, int]:
        values, vectors = sizes["R"] * width, 4 * width
        return 4 * values + vectors, 8 * values + 2 * vectors

    return Case("gelu_linear", "B256 197 rows width 3072", {"R": ROWS}, {"R": (1408, 2112)}, run, eager, minimum)
