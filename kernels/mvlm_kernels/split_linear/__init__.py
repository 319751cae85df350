"""A linear layer whose output is cut into parts, such as queries, keys and values; see :func:`split_linear`.

Backward, one kernel stacks the gradients of the parts and sums them for the bias. Matrix products are torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.split_linear import reference


def split_linear(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``linear(x, weight, bias)`` cut into `parts` equal parts of its last dimension, views of one tensor.

    x (.., C), weight (parts * W, C) and bias (parts * W,) of one dtype, without autocast. Returns tensors (.., W).
    Differentiable once. Under torch.compile and in transforms of torch.func the same in plain torch.
    """
    if torch.compiler.is_compiling() or registration.transformed():
        return F.linear(x, weight, bias).chunk(parts, -1)
    return _SplitLinear.apply(x, weight, bias, parts)  # pyright: ignore[reportReturnType]


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias).chunk(parts, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = [grad.flatten(0, -2) for grad in grads]
        stacked, sums = _op.in_function(*rows)(rows)
        grad = stacked.flatten(1)
        dx = (grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = grad.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw, sums.flatten().to(weight.dtype), None


_op = registration.define("stack_rows(Tensor[] parts) -> (Tensor, Tensor)", _stack_rows, _stack_rows_fake)
