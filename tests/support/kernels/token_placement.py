"""Inputs of place_tokens, an oracle in loops, and the check of all implementations."""

import functools
from typing import Any

import numpy as np
import torch

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.place_tokens import place_tokens
from support.kernels.accuracy import assert_accurate
from support.kernels.ops import placed_in_torch
from support.kernels.patches import make_ids
from support.kernels.pixel_losses import random
from triton_proof.allocations import guarded

NAMES = "tokens", "mask token", "position", "cls token"


def case(
    batch, num_patches, width, mode, dtype=torch.float32, parameter_dtype=None, visible=0, share=0.5
) -> tuple[list[Any], dict[str, Any]]:
    """The four tensors and the keyword arguments of a call in mode "all", "masked", "both" or "visible"."""
    parameter_dtype = parameter_dtype or dtype
    inputs = [
        random((batch, visible if mode == "visible" else num_patches, width), dtype),
        random((width,), parameter_dtype, 1),
        random((1 + num_patches, width), parameter_dtype, 2),
        random((width,), parameter_dtype, 3),
    ]
    if mode in ("masked", "both"):
        masked = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(4)) < share
        return inputs, {"masked": masked} | ({"with_unmasked": True} if mode == "both" else {})
    if mode == "visible":
        return inputs, {"visible_ids": make_ids(batch, visible, num_patches, torch.int32)}
    return inputs, {}


def oracle(inputs, grad, masked=None, visible_ids=None, with_unmasked=False):
    """Output and gradients of the four inputs in float64, position by position."""
    if with_unmasked:
        halves = [oracle(inputs, g, m) for g, m in zip(grad.chunk(2), (None, masked), strict=True)]
        return np.concatenate([half[0] for half in halves]), [
            a + b for a, b in zip(*(h[1] for h in halves), strict=True)
        ]
    tokens, mask_token, pos_embed, cls_token = (x.detach().double().numpy() for x in inputs)
    g = grad.double().numpy()
    out = np.zeros(g.shape)
    grads = [np.zeros(x.shape) for x in (tokens, mask_token, pos_embed, cls_token)]
    for b in range(g.shape[0]):
        out[b, 0] = cls_token + pos_embed[0]
        grads[3] += g[b, 0]
        grads[2] += g[b]
        for n in range(g.shape[1] - 1):
            row = n if masked is None or not masked[b, n] else None
            if visible_ids is not None:
                found = [k for k, i in enumerate(visible_ids[b].tolist()) if i == n]
                row = found[0] if found else None
            if row is None:
                out[b, 1 + n] = mask_token + pos_embed[1 + n]
                grads[1] += g[b, 1 + n]
            else:
                out[b, 1 + n] = tokens[b, row] + pos_embed[1 + n]
                grads[0][b, row] = g[b, 1 + n]
    return out, grads


def by_autograd(inputs, grad, **options):
    """Output and gradients of the four inputs in plain torch, computed in float32 (float64) and rounded once."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
    out = placed_in_torch(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, grad.to(dtype).to(wide), allow_unused=True, materialize_grads=True)
    return out.detach().to(dtype), [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


def check_placement(inputs, options, device="cpu", grad=None):
    """Compare the kernels and the composition of torch ops with the oracle, within the error of plain torch."""
    if grad is None:
        sequences = len(inputs[0]) * (2 if "with_unmasked" in options else 1)
        grad = random((sequences, *inputs[2].shape), torch.float64, 5)
    same, same_grads = by_autograd(inputs, grad, **options)
    grad = grad.to(same.dtype)
    out, grads = oracle(inputs, grad, **options)
    backends: tuple[dispatch.Backend, ...] = ("triton", "torch")
    for backend in backends:
        at = device if backend == "triton" else "cpu"
        x = [guarded(i, at).requires_grad_() for i in inputs]
        with use_backend(backend):
            tensors = {name: guarded(value, at) for name, value in options.items() if name != "with_unmasked"}
            got = place_tokens(*x, **{**options, **tensors})
            got.backward(guarded(grad, at))
        results = got.detach().cpu(), *(i.grad.cpu() for i in x if i.grad is not None)
        for name, a, b, want in zip(("out", *NAMES), results, (same, *same_grads), (out, *grads), strict=True):
            assert_accurate(f"{name} by {backend}", a, b, torch.from_numpy(want))
