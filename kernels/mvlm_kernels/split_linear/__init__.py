"""Linear layers of one input, such as queries, keys and values, by one product; see :func:`split_linear`.

Backward, one kernel stacks the gradients of the parts and sums them for the biases. Matrix products are torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels import dispatch, registration, shadows
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.linear import linear
from mvlm_kernels.split_linear import reference


def split_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """``linear(x, weight, bias)`` of each layer, by one product: views (.., heads, W / heads) of one tensor.

    x (.., C), weights (W, C) and biases (W,). The product is in x's dtype, under autocast too; parameters are converted
    to it, and their gradients come in their own. Differentiable once. Under torch.compile and in transforms of
    torch.func the same in plain torch.
    """
    if torch.compiler.is_compiling() or registration.transformed():
        weight, bias = (torch.cat([p.to(x.dtype) for p in parameters]) for parameters in (weights, biases))
        with dispatch.without_autocast(x.device):
            return _cut(F.linear(x, weight, bias), len(weights), heads)
    return _SplitLinear.apply(x, heads, *weights, *biases)  # pyright: ignore[reportReturnType]


def _cut(x: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (count, heads, -1)).unbind(-3)


def _stack_rows(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    device = parts[0].device
    if dispatch.choose(dispatch.reasons_for("split_linear", device)) == "torch":
        return reference.stack_rows(*parts)
    from mvlm_kernels.split_linear import triton

    return dispatch.run_kernels(("split_linear", device), triton.stack_rows, reference.stack_rows, *parts)


def _stack_rows_fake(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    (rows, width), count, first = parts[0].shape, len(parts), parts[0]
    return first.new_empty(rows, count, width), first.new_empty(count, width, dtype=compute_dtype(first.dtype))


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        ctx.dtypes = parameters[0].dtype, parameters[count].dtype
        weight, bias = (shadows.stacked(half, x.dtype) for half in (parameters[:count], parameters[count:]))
        ctx.save_for_backward(x, weight)
        return _cut(linear(x, weight, bias), count, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        count, (weight_dtype, bias_dtype) = len(grads), ctx.dtypes
        if dispatch.choose(dispatch.reasons_for("split_linear", x.device)) == "torch":
            # The stack is the only copy of gradients with any strides. On a CPU a sum of bf16 that is asked for float32
            # takes four times as long.
            grad = torch.stack(grads, dim=-3).flatten(-3).flatten(0, -2)  # (R, count * W)
            sums = grad.sum(0).unflatten(0, (count, -1))
        else:
            rows = [part.flatten(-2).flatten(0, -2) for part in grads]
            stacked, sums = _op.in_function(*rows)(rows)
            grad = stacked.flatten(1)
        dx = (grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        learns = any(ctx.needs_input_grad[2 : 2 + count])
        dw = (grad.T @ x.flatten(0, -2)).to(weight_dtype).chunk(count) if learns else (None,) * count
        return dx, None, *dw, *sums.to(bias_dtype)


_op = registration.define("stack_rows(Tensor[] parts) -> (Tensor, Tensor)", _stack_rows, _stack_rows_fake)
