"""Inputs of add_layer_norm, an oracle in loops over rows, and the check of all implementations."""

from typing import Any

import numpy as np
import torch

from mvlm_kernels import add_layer_norm, use_backend
from support.kernels.accuracy import accurate
from support.kernels.pixel_losses import random
from triton_proof.allocations import guarded

EPS = 1e-5
NAMES = "stream", "normalised", "dx", "dy", "dy_bias", "dweight", "dbias"


def case(
    rows,
    width,
    x_dtype=torch.float32,
    y_dtype: torch.dtype | None = torch.bfloat16,
    parameters=torch.float32,
    bias=True,
) -> list[Any]:
    """x, y, y_bias, weight, bias; y_dtype None leaves out y and y_bias, bias False leaves out y_bias."""
    y = None if y_dtype is None else random((rows, width), y_dtype, 1)
    y_bias = random((width,), parameters, 2) if bias and y is not None else None
    return [random((rows, width), x_dtype), y, y_bias, random((width,), parameters, 3), random((width,), parameters, 4)]


def oracle(inputs, grads, post_norm):
    """Both outputs and the gradients of all inputs in float64, row by row."""
    arrays: list[Any] = [None if t is None else t.detach().double().numpy() for t in inputs]
    x, y, y_bias, weight, bias = arrays
    by_stream, by_norm = (g.double().numpy() for g in grads)
    rows, width = x.shape
    total = x + (0 if y is None else y) + (0 if y_bias is None else y_bias)
    stream, normalised, dx = np.zeros((3, rows, width))
    dw, db = np.zeros((2, width))
    for r in range(rows):
        deviation = np.sqrt(np.mean((total[r] - total[r].mean()) ** 2) + EPS)
        n = (total[r] - total[r].mean()) / deviation
        normalised[r] = n * weight + bias
        stream[r] = normalised[r] if post_norm else total[r]
        g = by_norm[r] + (by_stream[r] if post_norm else 0)
        dw += g * n
        db += g
        # The Jacobian of the norm of one row, written out.
        jacobian = (np.eye(width) - 1 / width - np.outer(n, n) / width) / deviation
        dx[r] = jacobian @ (g * weight) + (0 if post_norm else by_stream[r])
    return [stream, normalised, dx, None if y is None else dx, None if y_bias is None else dx.sum(0), dw, db]


def by_op(inputs, grads, post_norm, backend, out_dtype):
    """The same from the op."""
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, y, y_bias, weight, bias = leaves
    with use_backend(backend):
        outputs = add_layer_norm(x, y, weight, bias, EPS, y_bias=y_bias, out_dtype=out_dtype, post_norm=post_norm)
        torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)])
    return [*(out.detach() for out in outputs), *(None if t is None else t.grad for t in leaves)]


def check(inputs, post_norm=False, out_dtype=torch.bfloat16):
    """Compare the torch code and the kernels with the oracle, in values and in dtypes."""
    stream_dtype = inputs[0].dtype if inputs[1] is None else torch.promote_types(inputs[0].dtype, inputs[1].dtype)
    grads = [random(inputs[0].shape, stream_dtype, 5), random(inputs[0].shape, out_dtype, 6)]
    wanted = oracle(inputs, grads, post_norm)
    inner: list[Any] = [None if t is None else guarded(t) for t in inputs]
    grads = [guarded(g) for g in grads]
    by_torch, by_kernel = (by_op(inner, grads, post_norm, backend, out_dtype) for backend in ("torch", "triton"))
    for name, want, slow, fast in zip(NAMES, wanted, by_torch, by_kernel, strict=True):
        assert (want is None) == (slow is None) == (fast is None), name
        if want is None:
            continue
        want = torch.from_numpy(want)
        # A 16-bit stream rounds the sum, whose relative error the norm and all gradients inherit.
        rms = None if stream_dtype.itemsize >= 4 else 2e-2
        terms = 4 * len(inputs[0]) ** 0.5
        accurate(f"{name} by torch", slow, slow, want, terms, rms)
        accurate(f"{name} by the kernels", fast, slow, want, terms, rms)
