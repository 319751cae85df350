"""Inputs of place_tokens, an oracle in loops, and the check of all implementations."""

from typing import Any

import numpy as np
import torch

from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.place_tokens import place_tokens, reference
from support.kernels.accuracy import assert_accurate
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


def by_reference(inputs, grad, masked=None, visible_ids=None, with_unmasked=False):
    """Output and gradients of the four inputs by the specification."""
    tokens, mask_token, pos_embed, cls_token = inputs
    out = reference.place_tokens(tokens, mask_token, pos_embed, cls_token, masked, visible_ids, with_unmasked)
    dtypes = tokens.dtype, mask_token.dtype, pos_embed.dtype, cls_token.dtype
    needs = True, True, True, True
    grad = grad.to(out.dtype)
    arguments = masked, visible_ids, with_unmasked, tokens.shape[1], dtypes, needs
    return out, reference.place_tokens_backward(grad, *arguments)


def check_placement(inputs, options, device="cpu", grad=None):
    """Compare the kernels and the CPU's composition with the oracle, within the error of the reference."""
    if grad is None:
        sequences = len(inputs[0]) * (2 if "with_unmasked" in options else 1)
        grad = random((sequences, *inputs[2].shape), torch.float64, 5)
    same, same_grads = by_reference(inputs, grad, **options)
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
